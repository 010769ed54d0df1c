"""The plugin through the command line: written models, expansion from masks, benchmarks, recipes, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.errors import UserError
from graftwork.models import load_model
from graftwork.testing.experts import open_tiny, save_tiny, tensors_of, tiny_experts
from graftwork.testing.models import tiny_model
from graftwork_mmer import Artefact, MmerMethod, MmerOptions
from graftwork_mmer.expansion.data import HIGHEST, draw_question, glyph, wave

Family = tuple[Path, dict[str, str]]


def words(family: Family, output: Path, **settings: Any) -> list[str]:
    base, refs = family
    sets = {**{f"transform.experts.{name}": ref for name, ref in refs.items()}, **settings}
    return [
        *("transform", f"--model={base}", f"--output={output}", "--plugin=mmer"),
        *(f"--set={key}={value}" for key, value in sets.items()),
    ]


@pytest.fixture(scope="module")
def written(half_family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that merged three experts in bfloat16."""
    from graftwork.testing.runs import call_trainer

    output = tmp_path_factory.mktemp("written") / "run"
    settings = {"plugins.mmer.keep": 0.5, "plugins.mmer.scale": "l2"}
    done = call_trainer(words(half_family, output, **settings))
    assert done.returncode == 0, done.stderr
    return output


def test_what_a_run_writes(half_family: Family, written: Path) -> None:
    result = json.loads((written / "result.json").read_text())["metrics"]
    assert 0 < result["mask_density"] < 1
    mean = sum(result[f"density_{name}"] for name in "abc") / 3
    assert mean == pytest.approx(result["mask_density"])
    assert 0 < result["sign_conflicts"] < 1
    assert 0 < result["relative_l1"] < 1
    artefact = Artefact.read(written)
    assert artefact.experts == ("a", "b", "c")
    assert artefact.base_sha256 == open_tiny(*half_family).base_digest
    found, base = tensors_of(written / "model"), tensors_of(half_family[0])
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(found[name], (base[name].float() + artefact.merged[name].float()).bfloat16())
    assert load_model(str(written)).config.num_hidden_layers == 2


def test_expansion_from_masks_is_that_from_experts(
    trainer: Any, half_family: Family, written: Path, tmp_path: Path
) -> None:
    """Bit by bit in bfloat16; no expert is read."""
    settings = {"plugins.mmer.keep": 0.5, "plugins.mmer.scale": "l2", "plugins.mmer.expand": "b"}
    code, _, err = trainer(*words(half_family, tmp_path / "experts", **settings))
    assert code == 0, err
    stored = {"plugins.mmer.artefact": written, "plugins.mmer.expand": "b"}
    code, _, err = trainer(*words((half_family[0], {}), tmp_path / "masks", **stored))
    assert code == 0, err
    one, other = tensors_of(tmp_path / "experts/model"), tensors_of(tmp_path / "masks/model")
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "masks/beside").exists()


def test_merged_models_are_no_experts(
    trainer: Any, half_family: Family, written: Path, tmp_path: Path
) -> None:
    again = {"a": half_family[1]["a"], "old": str(written)}
    code, _, err = trainer(*words((half_family[0], again), tmp_path / "run"))
    assert code == 2
    assert "expert 'old'" in err
    assert "was written by a merge" in err
    assert not (tmp_path / "run").exists()
    code, _, err = trainer(
        *words((half_family[0], again), tmp_path / "run", **{"plugins.mmer.allow_merged": "true"})
    )
    assert code == 0, err
    opened = open_tiny(half_family[0], {"old": str(written / "model")})
    with pytest.raises(UserError, match="was written by a merge"):
        Artefact.of(MmerMethod(MmerOptions()), opened)


def test_merging_a_merge_again_is_worse(family: Family, trainer: Any, tmp_path: Path) -> None:
    """What a second round adds to the error of an old expert; why it is refused."""
    base, refs = family
    old = {name: refs[name] for name in ("a", "b")}
    assert trainer(*words((base, old), tmp_path / "old", **{"plugins.mmer.keep": 1}))[0] == 0
    again = open_tiny(base, {"c": refs["c"], "old": str(tmp_path / "old")})
    whole = open_tiny(base, refs)
    drifted = Artefact.of(MmerMethod(MmerOptions(keep=1, allow_merged=True)), again)
    kept = Artefact.of(MmerMethod(MmerOptions(keep=1)), whole)
    missed = {"again": 0.0, "sources": 0.0}
    for piece in whole.pieces():
        missed["again"] += float((drifted.kept("old", piece.name, piece.rows) - piece.deltas[0]).abs().sum())
        missed["sources"] += float((kept.kept("a", piece.name, piece.rows) - piece.deltas[0]).abs().sum())
    assert missed["sources"] < missed["again"]


# ---------------------------------------------------------------------- refusals


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "keep 0": ({"plugins.mmer.keep": 0}, "'keep' = 0"),
    "keep 2": ({"plugins.mmer.keep": 2}, "'keep' = 2"),
    "lam": ({"plugins.mmer.lam": 0}, "is above 0"),
    "lam of one": ({"plugins.mmer.lam.a": -1}, "is above 0"),
    "alpha": ({"plugins.mmer.alpha": 0}, "'alpha' = 0"),
    "rule": ({"plugins.mmer.rule": "l3"}, "rule"),
    "expand": ({"plugins.mmer.expand": "d"}, "the experts are a, b, c"),
    "artefact": ({"plugins.mmer.artefact": "runs/x"}, "say with 'expand'"),
    "both": ({"plugins.mmer.artefact": "runs/x", "plugins.mmer.expand": "a"}, "not both"),
    "unknown": ({"plugins.mmer.kep": 1}, "did you mean 'keep'?"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(trainer: Any, family: Family, tmp_path: Path, kind: str) -> None:
    settings, sentence = REFUSED[kind]
    code, _, err = trainer(*words(family, tmp_path / "run", **settings))
    assert code == 2, err
    assert sentence in err
    assert not (tmp_path / "run").exists()


def _other_shape(folder: Path) -> str:
    return str(save_tiny(tiny_model("llama", intermediate_size=64), folder))


def _other_kind(folder: Path) -> str:
    return str(save_tiny(tiny_model("gpt2"), folder))


def _not_a_number(folder: Path) -> str:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[3, 3] = float("nan")
    return str(save_tiny(model, folder))


def _fewer_layers(folder: Path) -> str:
    return str(save_tiny(tiny_model("llama", num_hidden_layers=1), folder))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (_other_shape, "expert 'x'"),
        (_other_kind, "expert 'x'"),
        (_fewer_layers, "expert 'x'"),
        (
            _not_a_number,
            "expert 'x': tensor 'model.layers.0.mlp.up_proj.weight' holds values that are no numbers",
        ),
    ],
)
def test_experts_that_do_not_fit(
    trainer: Any, family: Family, tmp_path: Path, make: Any, sentence: str
) -> None:
    refs = {"a": family[1]["a"], "x": make(tmp_path / "x")}
    code, _, err = trainer(*words((family[0], refs), tmp_path / "run"))
    assert code == 2
    assert sentence in err
    assert not (tmp_path / "run/model").exists()


def _edit_masks(run: Path) -> None:
    path = next((run / "beside/mask.b").glob("*00002*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x01\x02\x03")


def _swap_masks(run: Path) -> None:
    shutil.rmtree(run / "beside/mask.b")
    shutil.copytree(run / "beside/mask.a", run / "beside/mask.b")


def _lose_a_file(run: Path) -> None:
    next((run / "beside/merged").glob("*.safetensors")).unlink()


def _lose_all(run: Path) -> None:
    shutil.rmtree(run / "beside")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_edit_masks, "is not the file that this merge has stored"),
        (_swap_masks, "is not the file that this merge has stored"),
        (_lose_a_file, "lacks the file"),
        (_lose_all, "holds no masks of mmer"),
    ],
)
def test_damaged_masks(
    trainer: Any, half_family: Family, written: Path, tmp_path: Path, damage: Any, sentence: str
) -> None:
    shutil.copytree(written, tmp_path / "copy")
    damage(tmp_path / "copy")
    settings = {"plugins.mmer.artefact": tmp_path / "copy", "plugins.mmer.expand": "b"}
    code, _, err = trainer(*words((half_family[0], {}), tmp_path / "run", **settings))
    assert code == 2
    assert sentence in err
    assert not (tmp_path / "run").exists()


def test_masks_of_another_base_or_expert(trainer: Any, written: Path, tmp_path: Path) -> None:
    other, _ = tiny_experts(tmp_path / "other", [])
    settings = {"plugins.mmer.artefact": written, "plugins.mmer.expand": "b"}
    code, _, err = trainer(*words((other, {}), tmp_path / "run", **settings))
    assert code == 2
    assert "are for another base" in err
    with pytest.raises(UserError, match="has no mask of 'd'"):
        Artefact.read(written, experts=["d"])


# ---------------------------------------------------------------------- benchmarks and recipes


@pytest.mark.parametrize("recipe", ["expansion", pytest.param("claim", marks=pytest.mark.slow)])
def test_recipes_run(trainer: Any, tmp_path: Path, recipe: str) -> None:
    if recipe == "claim":
        pytest.importorskip("graftwork_merging_baselines")
    code, _, err = trainer("run", f"mmer:{recipe}", "--size=smoke", f"--output={tmp_path / 'runs'}")
    assert code == 0, err
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("result.json"))]
    metrics = found[0]["metrics"] if recipe == "expansion" else {}
    if metrics:
        assert metrics["loss_glyph"] > 0
        assert {"single_union", "double_kept", "retention"} <= set(metrics)


@pytest.mark.parametrize("size", ["small", "paper"])
def test_recipes_are_valid(size: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from graftwork.recipe import load

    pytest.importorskip("graftwork_merging_baselines")
    monkeypatch.setenv("GRAFTWORK_DATA", str(tmp_path))
    path = Path(__file__).parents[1] / "src/graftwork_mmer/recipes/claim.yaml"
    recipe = load(path, size=size)
    arms = {job.arm for job in recipe.jobs}
    merges = {"mmer-k02", "mmer-k05", "average", "ties", "one-bit", "emr", "consensus", "dare", "kept-lora"}
    assert merges <= arms
    trained = {one.arm for one in recipe.jobs if one.job.benchmark is None}
    adapters = {arm for arm in trained if arm.endswith("-lora")}
    assert {f"{arm}-lora" for arm in trained - adapters} == adapters
    for job in recipe.jobs:
        if job.job.benchmark is not None:
            assert job.job.benchmark["merge"] == {"embeddings": "merge"}
            assert set(job.needs) == (adapters if job.arm == "kept-lora" else trained - adapters)


def test_questions_have_the_answers_that_they_should() -> None:
    draw = torch.Generator().manual_seed(0)
    same = [draw_question(("glyph", "wave"), "?", draw) for _ in range(400)]
    more = [draw_question(("text", "wave"), ">", draw) for _ in range(400)]
    for question in same:
        assert (question.answer == "y") == (question.numbers[0] == question.numbers[1])
    for question in more:
        assert (question.answer == "y") == (question.numbers[0] > question.numbers[1])
    for some in (same, more):
        assert 0.4 < sum(question.answer == "y" for question in some) / 400 < 0.6
    assert {number for question in same for number in question.numbers} == set(range(1, HIGHEST + 1))
    for number in range(1, HIGHEST + 1):
        assert glyph(number, draw).shape == (28, 28)
        loud = wave(number, draw).view(16, 32).square().mean(-1) > 0.1
        assert int(loud.sum()) == number
    assert (
        len(
            {
                tuple((glyph(n, torch.Generator().manual_seed(1)) > 0.6).flatten().tolist())
                for n in range(1, 9)
            }
        )
        == 8
    )
