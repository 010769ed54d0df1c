"""The plugin in the decode loop: neutral settings, batches, short answers, adapters, refusals, its claim."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError, recipe
from graftwork.cli import main
from graftwork.console import Console
from graftwork.generate import Decoding, Prompt, Trace, decode, generate
from graftwork.plugins import Plugins
from graftwork.run import Run
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork_coiecd import CONFORMING, LOWER, UPPER
from graftwork_coiecd import __file__ as package
from graftwork_kernels import dispatch
from peft import LoraConfig, get_peft_model

TOKENIZER = tiny_tokenizer()
PAIRS = [
    Prompt("The sky is green. What colour is the sky?", "What colour is the sky?"),
    Prompt("Rome lies in France. Where is Rome?", "Where?"),
    Prompt("a b", "a longer prompt without the context"),
]
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}
JOB = recipe.Job(model={"ref": "tiny"}, data={"source": "none"})
RECIPE = Path(package).parent / "recipes/claim.yaml"


def sharp(kind: str = "llama", **changes: Any) -> Any:
    """A tiny model with sharp predictions, whose greedy text differs between methods."""
    model = tiny_model(kind, **{"tie_word_embeddings": False, **changes})
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def by(model: Any, **options: Any) -> Decoding:
    run = Run(Path(), JOB, Plugins.from_options({"coiecd": options}))
    return Decoding.from_plugins(run, model)


def test_the_path_of_the_kernels_is_said_to_the_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "_SAID", set())
    plugins, model = Plugins.from_options({"coiecd": {}}), tiny_model()
    for console in (Console(enabled=False), Console(), Console()):
        Decoding.from_plugins(Run(Path(), JOB, plugins, console=console), model)
    assert capsys.readouterr().err.count(f"kernels: {dispatch.path_of('cpu')}") == 1


def write(model: Any, prompts: list[Prompt] = PAIRS, decoding: Decoding | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    given = {"max_new_tokens": 10, "do_sample": False, **options}
    return decode(model, prompts, tokenizer=TOKENIZER, decoding=decoding, **given)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2"])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "neutral", [{"ratio": 1}, {"constraint": "band", "gamma": "inf"}], ids=["softmax", "band"]
)
def test_the_neutral_setting_is_plain_generate(
    kind: str, options: dict[str, Any], neutral: dict[str, Any]
) -> None:
    model = sharp(kind)
    assert write(model, decoding=by(model, **neutral), **options) == write(model, **options)


@pytest.mark.parametrize("options", [{"alpha": 0.5}, {"alpha": 1.0}])
def test_an_infinite_ratio_is_guidance_of_transformers(options: dict[str, float]) -> None:
    model, pair = sharp(), PAIRS[0]
    ids, negative = (torch.tensor([TOKENIZER(text)["input_ids"]]) for text in (pair.main, pair.contrast))
    scale = 1 + options["alpha"]
    theirs = model.generate(
        ids, max_new_tokens=10, do_sample=False, guidance_scale=scale, negative_prompt_ids=negative
    )
    assert write(model, [pair], by(model, ratio="inf", **options)) == theirs[:, ids.shape[1] :].tolist()


def test_alpha_zero_without_violations_is_the_prior() -> None:
    model = sharp()
    alone = [Prompt(pair.contrast or "") for pair in PAIRS]
    assert write(model, decoding=by(model, alpha=0, ratio=1)) == write(model, alone)


def test_the_same_prompt_twice_is_plain() -> None:
    model = sharp()
    twice = [Prompt(pair.main, pair.main) for pair in PAIRS]
    assert write(model, twice, by(model)) == write(model)


@pytest.mark.parametrize("options", [{}, {"constraint": "band"}, {"base": "swapped"}])
def test_a_padded_batch_is_its_rows(options: dict[str, Any]) -> None:
    model = sharp()
    decoding = by(model, **options)
    found = write(model, decoding=decoding)
    assert found == [write(model, [pair], decoding)[0] for pair in PAIRS]
    assert found != write(model)


def test_joint_and_split_rows_cached_and_recomputed() -> None:
    model = sharp()
    decoding = by(model)
    found = write(model, decoding=decoding)
    assert write(model, decoding=decoding, rows="split") == found
    # Without a cache: every step reads both prompts again.
    tokens: list[int] = []
    ids = [TOKENIZER(text)["input_ids"] for text in (PAIRS[0].main, PAIRS[0].contrast)]
    for _ in range(10):
        with torch.no_grad():
            z2, z1 = (model(torch.tensor([one + tokens])).logits[:, -1].float() for one in ids)
        assert decoding.combiner is not None
        tokens.append(int(decoding.combiner.fn(z2, z1).argmax()))
    assert tokens == found[0]


def test_short_answers_seeds_and_rows_that_end() -> None:
    model = sharp()
    decoding = by(model)
    whole = write(model, decoding=decoding)
    assert write(model, decoding=decoding, max_new_tokens=1) == [row[:1] for row in whole]
    first = whole[1][0]
    ended = write(model, decoding=decoding, eos_token_id=first)
    assert ended[1] == [first]
    for row in (0, 2):
        stop = whole[row].index(first) + 1 if first in whole[row] else None
        assert ended[row] == whole[row][:stop]
    sampled = [write(model, decoding=decoding, do_sample=True) for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_with_an_adapter_under_inference_mode_and_streamed() -> None:
    config = LoraConfig(init_lora_weights=False, lora_alpha=64, target_modules="all-linear")
    model = get_peft_model(sharp(), config)
    decoding = by(model)
    found = write(model, decoding=decoding)
    with torch.inference_mode():
        assert write(model, decoding=decoding) == found

    class Streamer:
        def __init__(self) -> None:
            self.got: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.got.extend(value.flatten().tolist())

        def end(self) -> None:
            self.got.append(-1)

    streamer = Streamer()
    write(model, PAIRS[:1], decoding, streamer=streamer)
    assert streamer.got == [*TOKENIZER(PAIRS[0].main)["input_ids"], *found[0], -1]


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = sharp()
    plain = write(model)

    class Broken:
        def put(self, value: torch.Tensor) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(model, PAIRS[:1], by(model), streamer=Broken())
    assert not model.training
    assert write(model) == plain


def test_the_trace_names_the_sets() -> None:
    model, trace = sharp(), Trace()
    write(model, decoding=by(model), trace=trace)
    for step in (step for row in trace.rows for step in row):
        for one in step.candidates:
            assert set(one.sets) <= {LOWER, UPPER, CONFORMING}
            assert (CONFORMING in one.sets) != bool({LOWER, UPPER} & set(one.sets))


@pytest.mark.parametrize(
    ("prompts", "options", "problem"),
    [
        ([PAIRS[0], Prompt("alone")], {}, "prompt 2 has no context: 'coiecd' contrasts a prompt"),
        (PAIRS, {"num_beams": 2}, "num_beams=2 cannot be used with a combiner"),
        (PAIRS, {"guidance_scale": 1.5}, "guidance_scale=1.5 cannot be used"),
    ],
)
def test_refusals(prompts: list[Prompt], options: dict[str, Any], problem: str) -> None:
    model = sharp()
    with pytest.raises(UserError, match=problem):
        list(generate(model, TOKENIZER, prompts, decoding=by(model), **options))


def test_two_combiners_and_encoders_are_refused() -> None:
    model: Any = tiny_model("t5")
    with pytest.raises(UserError, match="needs a decoder-only model; t5"):
        write(model, decoding=by(model))
    plugins = Plugins.from_options({"coiecd": {}, "cad": {}})
    run = Run(Path(), JOB, plugins)
    with pytest.raises(UserError, match="a combiner of two prompts"):
        Decoding.from_plugins(run, model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"alpha": -1}, "plugin 'coiecd': option 'alpha' = -1: input should be greater than or equal to 0"),
        ({"ratio": 0.5}, "'ratio' = 0.5: input should be greater than or equal to 1"),
        ({"alpha": ".nan"}, "'alpha' = '.nan'"),
        ({"lambda": 4}, "unknown option 'lambda'"),
        ({"gamma": 3}, "gamma = 3.0 does nothing without constraint: band"),
    ],
)
def test_bad_options(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        by(sharp(), **options)


# ---------------------------------------------------------------- the claim


@pytest.mark.parametrize("size", ["small", "paper"])
def test_the_claim_has_its_arms(size: str) -> None:
    found = recipe.load(RECIPE, size=size)
    jobs = {spec.arm: spec.job for spec in found.jobs}
    plugins = {name: job.plugins for name, job in jobs.items()}
    assert plugins["greedy"] == plugins["memory-greedy"] == {}
    assert plugins["prior"] == {"prior": {}}
    assert plugins["cad-half"] == {"cad": {"alpha": 0.5}}
    assert plugins["cad"] == plugins["memory-cad"] == {"cad": {"alpha": 1}}
    assert plugins["swapped"] == {"coiecd": {"base": "swapped"}}
    assert plugins["band"] == plugins["memory-band"] == {"coiecd": {"constraint": "band"}}
    asked = [
        json.dumps(job.benchmark) for name, job in jobs.items() if (job.benchmark or {}).get("name") == "qa"
    ]
    assert len(asked) == 10
    assert len(set(asked)) == 1
    taught = [job for name, job in jobs.items() if name.startswith("memory-")]
    assert {json.dumps(job.benchmark) for job in taught} == {json.dumps(taught[0].benchmark)}
    assert all(job.model.ref == "step:teach" for job in taught)
    assert jobs["teach"].data.source == f"invented-facts:{(taught[0].benchmark or {})['facts']}"


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return int(caught.value.code or 0)


def test_decoding_runs_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFTWORK_DATA", raising=False)
    steps = ["greedy", "coiecd", "steps"]
    words = [word for name in steps for word in ("--step", name)]
    assert call("run", "coiecd:claim", "--size", "smoke", *words, "--output", str(tmp_path / "run")) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [job["name"] for job in results["jobs"]] == steps
    assert all(claim["verdict"] == "held" for claim in results["expect"])
    assert len(results["expect"]) == 2


@pytest.mark.slow
def test_the_whole_claim_runs_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFTWORK_DATA", raising=False)
    assert call("run", "coiecd:claim", "--size", "smoke", "--output", str(tmp_path / "run")) == 0
    jobs = json.loads((tmp_path / "run/results.json").read_text())["jobs"]
    assert len(jobs) == 12
    assert {"memory-coiecd", "teach"} <= {job["name"] for job in jobs}


def test_a_trace_page_from_the_command_line(tmp_path: Path) -> None:
    page = tmp_path / "trace.html"
    words = ["--model", "tiny-random", "--context", "Rome lies in France.", "--question", "Where is Rome?"]
    options = ["--plugin", "coiecd", "--set", "max_new_tokens=3", "--trace", str(page)]
    assert call("generate", *words, *options) == 0
    assert "Why every token was chosen: coiecd" in page.read_text()
