"""The plugin through the command line: a transform, its two benchmarks, its recipes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graftwork_dem  # noqa: F401
import pytest
import torch
from click.testing import CliRunner
from graftwork import UserError
from graftwork.cli import cli
from graftwork.edit.edits import EditSet
from graftwork.edit.errors import RequestError
from graftwork.edit.layouts import read_requests, write_requests
from graftwork.edit.metrics import WORDS
from graftwork.edit.requests import check_requests
from graftwork.expect import parse
from graftwork.plugins import discover
from graftwork.recipe import load
from graftwork.recipes import shipped
from graftwork.testing.models import tiny_checkpoint
from graftwork_dem.editor import DemEditor
from graftwork_dem.events import NAMES, commonsense, requests
from graftwork_dem.facts import facts
from graftwork_dem.localization import localization_benchmark
from graftwork_dem.options import LocateOptions
from graftwork_dem.settings import DemOptions
from safetensors.torch import load_file

RECIPES = shipped(discover()["dem"])
QUICK = {
    "plugins.dem.state.steps": 3,
    "plugins.dem.state.prefixes": 1,
    "plugins.dem.locate.draws": 2,
    "plugins.dem.locate.locate_variants": 1,
    "plugins.dem.lam": 0.01,
    "plugins.dem.max_share": 10,
}


def invoke(*words: Any, sets: dict[str, Any] | None = None) -> Any:
    flags = [word for key, value in (sets or {}).items() for word in ("--set", f"{key}={value}")]
    return CliRunner().invoke(cli, [*map(str, words), *flags], catch_exceptions=False, standalone_mode=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("model"), initializer_range=0.3, num_hidden_layers=4, seed=5
    )


def whole(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def test_a_transform_writes_the_edited_model_and_the_edits_beside_it(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sets = {
        **QUICK,
        "transform.calibration": "random",
        "transform.samples": 4,
        "transform.window": 32,
        "plugins.dem.requests": "graftwork_dem.events:requests",
        "plugins.dem.limit": 2,
    }
    invoke("transform", "--model", source, "--plugin", "dem", "--output", run, sets=sets)
    factors = whole(run / "beside" / "edits")
    names = {key.rpartition(".")[0] for key in factors}
    before, after = whole(source), whole(run / "model")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in names}
    for name in names:
        delta = factors[f"{name}.R"].double() @ factors[f"{name}.Z"].double().T
        found = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        torch.testing.assert_close(found, delta, rtol=1e-4, atol=1e-6)


def evaluate(source: Path, output: Path, sets: dict[str, Any], name: str) -> dict[str, Any]:
    invoke(
        "evaluate",
        "--model",
        source,
        "--plugin",
        "dem",
        "--benchmark",
        name,
        "--output",
        output / "result.json",
        sets=sets,
    )
    return json.loads((output / "result.json").read_text())


def test_the_editing_benchmark_edits_and_restores(source: Path, tmp_path: Path) -> None:
    sets = {
        **QUICK,
        "benchmark.requests": "graftwork_dem.events:requests",
        "benchmark.limit": 2,
        "benchmark.unseen_variants": 2,
        "benchmark.corpus": "random",
        "benchmark.window": 32,
        "benchmark.held_out": "random",
        "benchmark.held_out_windows": 2,
        "benchmark.generate": "false",
    }
    result = evaluate(source, tmp_path / "run", sets, "dem:editing")
    assert result["metrics"]["target_log_prob"] > result["metrics"]["before_target_log_prob"]
    assert result["metrics"]["drift"] > 0
    assert len(result["items"]["instantiated_log_prob"]) == 2
    assert "the weights were restored bit for bit" in result["notes"]


@pytest.mark.parametrize("mode", ["trace", "attribution", "recall"])
def test_the_localization_benchmark_maps_both_sets(source: Path, tmp_path: Path, mode: str) -> None:
    sets: dict[str, Any] = {
        "benchmark.mode": mode,
        "benchmark.items": 3,
        "benchmark.draws": 2,
        "benchmark.locate_variants": 1,
        "benchmark.known": "false",
        "benchmark.least": 0,
    }
    result = evaluate(source, tmp_path / "run", sets, "dem:localization")
    metrics, items = result["metrics"], result["items"]
    assert set(metrics) <= set(localization_benchmark().metrics)
    for which in ("commonsense", "facts", "before"):
        assert 0 < metrics[f"entropy_{which}"] <= 1
        assert len(items[f"entropy_{which}"]) == 3
    assert ("agreement" in metrics) == (mode == "trace")
    assert ("lost_facts" in metrics) == (mode != "recall")
    titles = [chart["title"] for chart in result["lines"]]
    assert titles[:3] == ["Where it sits", "Score by layer", "Before and after decoupling"]
    heat = result["lines"][0]
    assert [*heat["rows"]] == ["commonsense, attn", "commonsense, mlp", "facts, attn", "facts, mlp"]
    assert heat["columns"] == ["0", "1", "2", "3"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "items.jsonl").read_text().splitlines()]
    mapped = [row for row in rows if "scores" in row]
    assert [row["set"] for row in mapped] == ["commonsense"] * 3 + ["facts"] * 3
    assert all(len(row["scores"][kind]) == 4 for row in mapped for kind in ("attn", "mlp"))


def test_the_same_seed_gives_the_same_map(source: Path, tmp_path: Path) -> None:
    sets: dict[str, Any] = {
        "benchmark.mode": "attribution",
        "benchmark.items": 2,
        "benchmark.draws": 1,
        "benchmark.known": "false",
        "benchmark.least": 0,
    }
    one, other = (evaluate(source, tmp_path / name, sets, "dem:localization") for name in "ab")
    assert one["items"] == other["items"]


def test_nothing_to_compare_is_told(source: Path, tmp_path: Path) -> None:
    write_requests(tmp_path / "some.jsonl", commonsense(3))
    sets = {
        "benchmark.commonsense": tmp_path / "some.jsonl",
        "benchmark.items": 2,
        "benchmark.draws": 1,
        "benchmark.least": 50,
        "benchmark.locate_variants": 0,
    }
    with pytest.raises(UserError, match="of 3 requests of commonsense, 0 can be located, and two are needed"):
        evaluate(source, tmp_path / "run", sets, "dem:localization")


def test_a_transform_without_requests_or_text_is_told(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set plugins\.dem\.requests=FILE"):
        invoke("transform", "--model", source, "--plugin", "dem", "--output", tmp_path / "a")
    sets = {"plugins.dem.requests": "graftwork_dem.events:requests"}
    with pytest.raises(UserError, match="takes second moments of a text, and none is set"):
        invoke("transform", "--model", source, "--plugin", "dem", "--output", tmp_path / "b", sets=sets)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mode": "fixed"}, "needs its sites"),
        ({"sites": ["mlp.1"]}, "sites are for mode: fixed"),
        ({"mode": "fixed", "sites": ["mlp"]}, "no site"),
        ({"mode": "fixed", "sites": ["mlp.1", "mlp.1"]}, "twice"),
        ({"n_sites": 2, "min_attn": 2, "min_mlp": 1}, "ask for 3 sites, and n_sites allows 2"),
        ({"noise": 0}, "changes nothing"),
        ({"l_min": 3, "l_max": 2}, "no layer may be chosen"),
        ({"mode": "guess"}, "mode"),
        ({"draws": 0}, "draws"),
        ({"kinds": []}, "kinds"),
        ({"unknown": 1}, "unknown"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_that_make_no_sense_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LocateOptions.model_validate(given)


def test_a_state_given_in_part_keeps_its_three_variants() -> None:
    assert DemOptions.model_validate({}).state.variants == 3
    assert DemOptions.model_validate({"state": {"steps": 2}}).state.variants == 3
    assert DemOptions.model_validate({"state": {"variants": 0}}).state.variants == 0


def test_a_map_has_no_choice_of_sites() -> None:
    options = localization_benchmark().options
    assert options is not None
    with pytest.raises(ValueError, match="no use for 'n_sites'"):
        options.model_validate({"n_sites": 3})


def test_the_edits_of_ours_can_all_be_made_and_hold_no_answer_in_their_prompts() -> None:
    found = commonsense()
    check_requests(found)
    assert len(found) == 200
    assert len({one.subject for one in found[:40]}) == 40
    for one in found:
        assert one.target not in one.text
        assert [variant.split()[0] for variant in one.variants] == [*NAMES]
        assert all(
            one.subject in paraphrase and one.target not in paraphrase for paraphrase in one.paraphrases
        )
        assert len(one.neighbors) == 3
        assert all(one.subject not in probe.prompt and probe.target != one.target for probe in one.neighbors)
    assert [one.id for one in read_requests("graftwork_dem.events:requests", limit=2, offset=3)] == [
        one.id for one in commonsense(2, 3)
    ]
    with pytest.raises(RequestError, match="made and not read"):
        requests(Path("x"))


def test_the_facts_of_ours_come_in_turn_and_ask_before_they_tell() -> None:
    found = facts()
    check_requests(found)
    assert len(found) >= 100
    assert len({one.prompt for one in found[:7]}) == 7
    assert all(not one.text.lower().endswith(one.target.lower()) for one in found)


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("size", ["smoke", "small", "paper"])
def test_recipes_expect_what_is_measured_and_sizes_are_whole(name: str, size: str) -> None:
    recipe = load(RECIPES[name], size=size)
    known = [*localization_benchmark().metrics, *WORDS, *(f"before_{one}" for one in WORDS), "drift"]
    for claim in recipe.expect:
        parse(claim, recipe.arms, known)
    assert bool(recipe.expect) == (size != "smoke")


def test_a_saved_edit_set_is_read_back(source: Path, tmp_path: Path) -> None:
    from graftwork.console import Console
    from graftwork.edit.statistics import IdentityStatistics
    from graftwork.testing.models import tiny_tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source).eval()
    options = DemOptions.model_validate({"lam": 0.01, "state": {"steps": 2, "prefixes": 0}, "max_share": 10})
    made = DemEditor(options).edit(
        model, tiny_tokenizer(), commonsense(2), IdentityStatistics(), console=Console(enabled=False), seed=0
    )
    read = EditSet.load(made.save(tmp_path / "edits.safetensors"))
    assert all(torch.equal(value, read.tensors()[name]) for name, value in made.tensors().items())
    assert read.report["requests"] == json.loads(json.dumps(made.report["requests"]))


def test_names_that_are_asked_later_are_kept_from_the_editor(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ...]] = []
    real = DemEditor.edit

    def spying(self: Any, model: Any, tokenizer: Any, requests: Any, *rest: Any, **more: Any) -> Any:
        seen.extend(one.variants for one in requests)
        return real(self, model, tokenizer, requests, *rest, **more)

    monkeypatch.setattr(DemEditor, "edit", spying)
    sets = {
        **QUICK,
        "benchmark.requests": "graftwork_dem.events:requests",
        "benchmark.limit": 1,
        "benchmark.unseen_variants": 2,
        "benchmark.generate": "false",
        "plugins.dem.statistics": "identity",
    }
    evaluate(source, tmp_path / "run", sets, "dem:editing")
    (request,) = commonsense(1)
    assert seen == [request.variants[:3]]
