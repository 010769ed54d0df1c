"""The plugin through the command line and with other parts of a run; cale.json; the recipe's smoke size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from graftwork import Combiner, UserError
from graftwork.cli import cli
from graftwork.evaluate.qa import METRICS as QA_METRICS
from graftwork.expect import parse
from graftwork.generate import Decoding, Prompt, decode
from graftwork.plugins import Plugins, construct, discover
from graftwork.recipe import Job, load
from graftwork.recipes import shipped
from graftwork.run import Run
from graftwork.testing.models import tiny_tokenizer
from graftwork_cale import CaleConfig, LayerEnhancement, read_config
from graftwork_cale.benchmarks import LAYERS_METRICS, NO_HARM_METRICS
from graftwork_cale.options import LayersOptions
from pydantic import ValidationError

TOKENIZER = tiny_tokenizer()
Lively = Callable[..., Any]
PAIRS = [Prompt("The sky is green. Sky?", "Sky?"), Prompt("abc def", "def")]
CHOICE = {
    "model": "llama",
    "layers": 4,
    "variant": "amplify",
    "layer": 2,
    "strength": 1.7,
    "positions": "predicting",
    "criterion": "growth",
    "off": False,
    "curves": {"kl": [0.0, 1.0, 1.0, 1.0]},
    "scores": [[None, 1.0, 0.1], [2, 1.7, 0.2]],
    "data": "0" * 64,
    "items": 3,
}


def invoke(*words: str) -> Any:
    return CliRunner().invoke(cli, list(words), catch_exceptions=False, standalone_mode=False)


def refused(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        invoke(*words)
    return str(caught.value)


def run_of(options: dict[str, Any], **job: Any) -> Run:
    settings = {"model": {"ref": "x"}, "data": {"source": "none"}, "plugins": {"cale": options}, **job}
    return Run(Path(), Job.model_validate(settings), Plugins.from_options({"cale": options}))


def written(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "cale.json"
    path.write_text(json.dumps({**CHOICE, **changes}))
    return str(path)


def tokens(model: Any, options: dict[str, Any], **given: Any) -> Any:
    decoding = Decoding.from_plugins(run_of(options), model)
    return decode(
        model, PAIRS, tokenizer=TOKENIZER, decoding=decoding, max_new_tokens=8, do_sample=False, **given
    )


def by_hand(
    model: Any, layer: int, strength: float, variant: Any = "amplify", positions: Any = "predicting"
) -> Any:
    one = LayerEnhancement(model, layer, strength, variant, positions)
    decoding = Decoding(before_forward=[one.before_forward], contexts=lambda: [one])
    return decode(model, PAIRS, tokenizer=TOKENIZER, decoding=decoding, max_new_tokens=8, do_sample=False)


def test_a_layer_and_a_strength(lively: Lively) -> None:
    model = lively()
    expected = by_hand(model, 2, 1.7)
    assert tokens(model, {"layer": 2, "strength": 1.7}) == expected
    assert expected != decode(model, PAIRS, tokenizer=TOKENIZER, max_new_tokens=8, do_sample=False)
    everywhere = tokens(model, {"layer": 2, "strength": 1.7, "variant": "residual", "positions": "all"})
    assert everywhere == by_hand(model, 2, 1.7, "residual", "all")
    assert not any(module._forward_hooks for module in model.modules())


def test_a_config_and_what_overrules_it(lively: Lively, tmp_path: Path) -> None:
    model, path = lively(), written(tmp_path)
    assert tokens(model, {"config": path}) == by_hand(model, 2, 1.7)
    assert tokens(model, {"config": path, "layer": 3, "variant": "growth"}) == by_hand(
        model, 3, 1.7, "growth"
    )
    assert tokens(model, {"config": path, "strength": 2.5}) == by_hand(model, 2, 2.5)
    plain = decode(model, PAIRS, tokenizer=TOKENIZER, max_new_tokens=8, do_sample=False)
    off = written(tmp_path, off=True, layer=None, strength=1.0)
    assert tokens(model, {"config": off}) == plain
    with pytest.raises(UserError, match=r"chose no layer \(it says off\), so strength 1.5 needs one"):
        tokens(model, {"config": off, "strength": 1.5})


def test_a_choice_that_is_off_is_said_once(lively: Lively, tmp_path: Path) -> None:
    said: list[str] = []
    for off in (True, False):
        changes = {"off": True, "strength": 1.0} if off else {}
        run = run_of({"config": written(tmp_path, **changes)})
        run.console = type("Console", (), {"say": lambda self, text: said.append(text)})()  # type: ignore[assignment]
        model = lively()
        for _ in range(2):
            run.plugins.call("generation_context", run=run, model=model)
    assert len(said) == 1
    assert "says off" in said[0]


def test_every_layer(lively: Lively) -> None:
    model = lively()
    parts = [LayerEnhancement(model, layer, 1.2) for layer in (1, 2, 3)]
    decoding = Decoding(before_forward=[part.before_forward for part in parts], contexts=lambda: parts)
    expected = decode(model, PAIRS, tokenizer=TOKENIZER, decoding=decoding, max_new_tokens=8, do_sample=False)
    assert tokens(model, {"layer": "every", "strength": 1.2}) == expected


@pytest.mark.parametrize("rows", ["joint", "split"])
def test_beside_a_combiner_main_rows_or_both(lively: Lively, rows: Any) -> None:
    """The contrast stream is the plain model's unless streams: both."""
    model = lively(dtype=torch.float64)
    seen: list[torch.Tensor] = []

    def fn(main: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
        seen.append(torch.stack([main, contrast]))
        return 1.5 * main - 0.5 * contrast

    found = {}
    for name, options in (("main", {}), ("both", {"streams": "both"}), ("off", None)):
        seen.clear()
        run = run_of({"layer": 2, "strength": 1.7, **(options or {})})
        own = Decoding.from_plugins(run, model)
        combiner = Combiner("cad", fn)
        decoding = (
            Decoding(combiner)
            if options is None
            else Decoding(combiner, before_forward=own.before_forward, contexts=own.contexts)
        )
        decode(
            model, PAIRS, tokenizer=TOKENIZER, decoding=decoding, rows=rows, max_new_tokens=2, do_sample=False
        )
        found[name] = seen[0]
    assert torch.equal(found["main"][1], found["off"][1])
    assert not torch.allclose(found["both"][1], found["off"][1])
    assert torch.equal(found["both"][0], found["main"][0])
    assert not torch.allclose(found["main"][0], found["off"][0])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"layer": 2}, "strength is missing: give layer and strength, or a config"),
        ({"strength": 1.5}, "layer is missing"),
        ({"variant": "growth"}, "variant needs a layer and a strength"),
        ({"layer": 2, "strength": 0}, "'strength' = 0"),
        ({"layer": 2, "strength": float("nan")}, "'strength' = nan"),
        ({"layer": 2, "strength": 1.5, "factor": 3}, "unknown option 'factor'"),
        ({"layer": "all", "strength": 1.5}, "'layer"),
        ({"layer": 2, "strength": 1.5, "positions": "last"}, "'positions' = 'last'"),
    ],
)
def test_bad_options(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        construct("cale", options)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layers": 6}, "measured on 'llama' with 6 layers, and this model is 'llama' with 4"),
        ({"model": "org/other"}, "measured on 'org/other' with 4 layers, and this model is 'llama'"),
        ({"layer": 4}, "layer 4 is the last one"),
        ({"off": True}, "off means strength 1"),
        ({"layer": None}, "a strength needs a layer"),
        ({"strength": -1}, "strength"),
        ({"more": 1}, "more"),
    ],
)
def test_bad_configs(lively: Lively, tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        tokens(lively(), {"config": written(tmp_path, **changes)})


def test_what_can_be_refused_before_weights_are_read(tmp_path: Path) -> None:
    run = run_of({})
    with pytest.raises(UserError, match="does not know which layer to enhance; set plugins"):
        run.plugins.check(run)
    measuring = run_of({}, benchmark={"name": "cale:layers", "data": "tiny"})
    measuring.plugins.call("check", run=measuring)
    for path, problem in (
        (tmp_path / "none.json", "cannot be read"),
        (tmp_path / "text.json", "is not JSON"),
    ):
        (tmp_path / "text.json").write_text("layer 3")
        run = run_of({"config": str(path)})
        with pytest.raises(UserError, match=problem):
            run.plugins.check(run)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"strengths": [1.5, 0]}, "each must be greater than 0"),
        ({"strengths": []}, "at least 1"),
        ({"score": False}, "without scoring, 5 strengths cannot be told apart"),
        ({"score": False, "criterion": "supervised", "strengths": [2]}, "criterion: supervised needs score"),
    ],
)
def test_bad_options_of_the_benchmark(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        LayersOptions.model_validate({"data": "tiny", **options})


LAYERS = ("evaluate", "--model", "tiny-random", "--benchmark", "cale:layers", "--set", "benchmark.data=tiny")


def test_evaluate_writes_charts_json_and_a_choice_that_generate_takes(tmp_path: Path) -> None:
    output = tmp_path / "layers.json"
    sets = ("limit=4", "score=false", "strengths=[1.5]", "criterion=peak", "variant=residual")
    invoke(
        *LAYERS, *(word for one in sets for word in ("--set", f"benchmark.{one}")), "--output", str(output)
    )
    result = json.loads(output.read_text())
    assert result["metrics"]["strength"] == 1.5
    titles = [chart["title"] for chart in result["lines"]]
    assert titles == [
        "What each layer says of the context's answer",
        "What the context changes in each layer",
    ]
    assert "What the context changes in each layer" in output.with_suffix(".html").read_text()
    choice = read_config(str(tmp_path / "cale.json"))
    assert (choice.layers, choice.variant, choice.criterion, choice.off) == (4, "residual", "peak", False)
    assert choice.layer in (2, 3)
    assert choice.layer == result["metrics"]["layer"]
    assert choice.curves["kl"][choice.layer - 1] == max(choice.curves["kl"][1:3])
    assert len(choice.curves["mean"]) == 4
    assert choice.items == 4
    control = read_config(str(tmp_path / "random-layer.json"))
    assert {choice.layer, control.layer} == {2, 3}
    assert control.strength == 1.5
    words = ("generate", "--model", "tiny-random", "--plugin", "cale", "--prompt", "x")
    assert "config" in refused(*words)


def test_a_scored_choice_is_off_where_nothing_is_better(tmp_path: Path) -> None:
    output = tmp_path / "layers.json"
    sets = ("limit=3", "criterion=supervised", "strengths=[1.5, 3]", "max_new_tokens=2", "offset=1")
    run = invoke(
        *LAYERS, *(word for one in sets for word in ("--set", f"benchmark.{one}")), "--output", str(output)
    )
    assert "off: no strength scores better than the model as it is (5 settings on 3 items)" in run.output
    choice = read_config(str(tmp_path / "cale.json"))
    assert (choice.off, choice.layer, choice.strength) == (True, None, 1)
    assert [score[:2] for score in choice.scores] == [(None, 1), (2, 1.5), (2, 3), (3, 1.5), (3, 3)]
    # The same questions give the same hash, others another.
    again = tmp_path / "again"
    again.mkdir()
    for offset, same in ((1, True), (2, False)):
        changed = (*(one for one in sets if "offset" not in one), f"offset={offset}")
        words = (word for one in changed for word in ("--set", f"benchmark.{one}"))
        invoke(*LAYERS, *words, "--output", str(again / "layers.json"))
        assert (read_config(str(again / "cale.json")).data == choice.data) is same


def test_questions_without_a_context_or_answer_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    words = (
        "evaluate",
        "--model",
        "tiny-random",
        "--benchmark",
        "cale:layers",
        "--set",
        f"benchmark.data={path}",
    )
    path.write_text(json.dumps({"question": "q?", "context": "c", "answers": []}) + "\n")
    assert "line 1" in refused(*words)
    path.write_text(json.dumps({"question": "q?", "answers": ["a"]}) + "\n")
    assert "context" in refused(*words)


def test_no_harm_compares_with_and_without(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words of a text " * 40)
    output = tmp_path / "harm.json"
    words = ["evaluate", "--model", "tiny-random", "--benchmark", "cale:no-harm", "--output", str(output)]
    sets = ["data=tiny", "limit=3", "max_new_tokens=3", f"text={text}", "window=32", "windows=3"]
    words += [word for one in sets for word in ("--set", f"benchmark.{one}")]
    assert "does not know which layer" in refused(*words)
    assert "layer 9 is not in a model of 4" in refused(
        *words, "--plugin", "cale", "--set", "plugins.cale.layer=9", "--set", "plugins.cale.strength=2"
    )
    found = {}
    for strength in ("1", "8"):
        choice = (
            "--plugin",
            "cale",
            "--set",
            "plugins.cale.layer=2",
            "--set",
            f"plugins.cale.strength={strength}",
        )
        invoke(*words, *choice)
        found[strength] = json.loads(output.read_text())
    same, changed = (found[strength]["metrics"] for strength in ("1", "8"))
    assert same["perplexity"] == same["perplexity_off"] == changed["perplexity_off"]
    assert changed["perplexity"] != changed["perplexity_off"]
    rows = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert set(rows[0]) == {"question", "answers", "off", "on"}


def test_the_recipe_runs_at_its_smallest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFTWORK_DATA", raising=False)
    output = tmp_path / "run"
    invoke("run", "cale:claim", "--size", "smoke", "--output", str(output))
    results = json.loads((output / "results.json").read_text())
    names = [job["name"] for job in results["jobs"]]
    assert names[:2] == ["choose", "plain"]
    assert {"cale", "fixed", "random-layer", "every-layer", "harm"} <= set(names)
    chosen, control = (
        read_config(str(output / "choose" / f"{name}.json")) for name in ("cale", "random-layer")
    )
    assert chosen.layer != control.layer


@pytest.mark.parametrize("size", ["small", "paper"])
def test_the_claims_name_what_is_measured(size: str) -> None:
    recipe = load(shipped(discover()["cale"])["claim"], size=size)
    measured = [*QA_METRICS, *LAYERS_METRICS, *NO_HARM_METRICS]
    claims = [parse(text, recipe.arms, measured) for text in recipe.expect]
    assert {claim.arm for claim in claims} == {"choose", "cale", "cale-supervised", "fixed", "harm"}


def test_a_config_says_what_it_is() -> None:
    assert CaleConfig.model_validate(CHOICE).layer == 2
    for field in CHOICE:
        with pytest.raises(ValidationError):
            CaleConfig.model_validate({key: value for key, value in CHOICE.items() if key != field})
