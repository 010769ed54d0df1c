"""The plugin through the command line: the checkpoint that comes out, the report's figures, the recipe's smoke size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graftwork_dam  # noqa: F401
import pytest
import torch
from click.testing import CliRunner
from graftwork import UserError
from graftwork.cli import cli
from graftwork.expect import parse
from graftwork.plugins import discover
from graftwork.recipe import load
from graftwork.recipes import shipped
from graftwork.testing.models import tiny_checkpoint, tiny_tokenizer
from graftwork.transform.calibration import read_windows
from graftwork.transform.modules import Factored
from graftwork.transform.options import TransformOptions
from graftwork_dam.compress import FIGURES
from graftwork_dam.settings import metric_words
from torch.nn import functional
from transformers import AutoModelForCausalLM

TEXTS: dict[str, Any] = {
    "calibration": "random",
    "samples": 4,
    "window": 24,
    "evaluation": "random",
    "evaluation_window": 24,
    "evaluation_windows": 2,
}
CLAIM = shipped(discover()["dam"])["claim"]


def invoke(*words: Any) -> Any:
    return CliRunner().invoke(cli, [*map(str, words)], catch_exceptions=False, standalone_mode=False)


def transform(model: Path, output: Path, **options: Any) -> dict[str, Any]:
    sets = {f"transform.{key}": value for key, value in TEXTS.items()}
    sets |= {f"plugins.dam.{key}": value for key, value in {"learn.steps": 2, **options}.items()}
    words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    invoke("transform", "--model", model, "--plugin", "dam", "--output", output, *words)
    return json.loads((output / "result.json").read_text())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), initializer_range=0.3)


def nll(model: Any) -> list[float]:
    texts = TransformOptions.model_validate(TEXTS)
    (ids,) = read_windows(texts, tiny_tokenizer(), model.config, 42).evaluation
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].float()
    return [functional.cross_entropy(a, b).item() for a, b in zip(logits, ids[:, 1:], strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scheme": "W4A8", "latent_bits": 4},
        {"scheme": "W3A16", "quantizer": "rtn", "place": "both"},
        {"order": "ql"},
        {"format": "merged"},
    ],
    ids=str,
)
def test_the_checkpoint_loads_and_is_what_was_measured(
    source: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    result = transform(source, tmp_path / "run", **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").eval()
    assert nll(model) == pytest.approx(result["items"]["nll"], abs=1e-6)
    factored = [one for one in model.modules() if isinstance(one, Factored)]
    assert len(factored) == (0 if "format" in options else 14)
    # Loading again gives the same bits.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").eval()
    ids = torch.arange(20, 44)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_figures_are_in_the_result_and_in_transform_json(source: Path, tmp_path: Path) -> None:
    result = transform(source, tmp_path / "run")
    own = [name for name in FIGURES if not name.startswith("block_")]
    assert {*own} <= {*result["metrics"]}
    assert all(result["words"][name] == FIGURES[name] for name in own)
    layers = json.loads((tmp_path / "run/transform.json").read_text())["layers"]
    linears = [record for layer in layers for record in layer["linears"].values()]
    assert len(linears) == 14
    for name in own:
        mean = sum(record[name] for record in linears) / len(linears)
        assert result["metrics"][name] == pytest.approx(mean)
    assert {record["start"] for record in linears} <= {"learned"} | {
        *(f"p{p:g}" for p in (0, 0.25, 0.5, 0.75, 1)),
        *(f"smoothquant{a:g}" for a in (0, 0.25, 0.5, 0.75, 1)),
    }


def test_without_texts_it_says_what_is_missing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="plugin 'dam' looks at activations, and no calibration text is set"):
        invoke("transform", "--model", source, "--plugin", "dam", "--output", tmp_path / "run")


def test_a_model_that_dam_made_is_not_compressed_again(source: Path, tmp_path: Path) -> None:
    transform(source, tmp_path / "run")
    with pytest.raises(UserError):
        transform(tmp_path / "run/model", tmp_path / "again")


def test_what_the_claim_expects_can_be_measured() -> None:
    for size in ("scratch", "small", "paper"):
        recipe = load(CLAIM, size=size)
        known = [*metric_words(), "delta_nll"]
        for text in recipe.expect:
            parse(text, recipe.arms, known)


def test_the_smoke_size_runs(tmp_path: Path) -> None:
    """The steps that need this distribution alone."""
    words = ["--step", "additivity", "--step", "dam-w4", "--step", "dam-qlq-w4"]
    outcome = invoke("run", "dam:claim", "--size", "smoke", "--output", tmp_path / "run", *words)
    assert outcome.return_value in (0, None)
    jobs = {job["name"]: job for job in json.loads((tmp_path / "run/results.json").read_text())["jobs"]}
    assert [*jobs] == ["additivity", "dam-w4", "dam-qlq-w4"]
    metrics = jobs["additivity"]["metrics"]
    claimed = {
        text.split()[0].partition(".")[2]
        for text in load(CLAIM, size="small").expect
        if "additivity." in text
    }
    assert claimed <= {*metrics}
    assert metrics["gap_p05_w4"] == pytest.approx(metrics["delta_p05_w4"] - metrics["delta_sum_w4"], abs=1e-6)
    assert (tmp_path / "run/additivity/additivity.json").is_file()
    rows = [json.loads(line) for line in (tmp_path / "run/additivity/items.jsonl").open()]
    assert len(rows) == 2 + 2 + 2 * 2 * (8 + 5)
    page = (tmp_path / "run/report.html").read_text()
    assert "nats per token lost over bits" in page
    assert "output error over bits" in page
