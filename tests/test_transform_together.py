"""Methods of several packages on one model, in the order of the flags; what is written is what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.evaluate.modes import evaluating
from graftwork.models import load_model
from graftwork.testing.models import tiny_checkpoint
from graftwork.transform.calibration import read_windows
from graftwork.transform.options import TransformOptions

TEXTS = {
    "calibration": "random",
    "samples": 8,
    "window": 32,
    "evaluation": "random",
    "evaluation_window": 32,
    "batch_size": 4,
}
CHAINS = {
    "rtn": ["rtn.scheme=W4A4KV4"],
    "gptq": ["gptq.scheme=W3A16", "gptq.group=16"],
    "smoothquant-gptq": ["smoothquant", "gptq.scheme=W4A8"],
    "awq": ["awq.scheme=W3A16"],
    "rotated-gptq": ["hadamard", "gptq.scheme=W4A4KV4"],
    "rotated-online-rtn": ["hadamard.place=online", "rtn.scheme=W4A4"],
    "smoothquant-rotated-rtn": ["smoothquant", "hadamard.place=online", "rtn.scheme=W4A4"],
    "svd": ["svd.ratio=0.8"],
    "svd-gptq": ["svd.ratio=0.8", "gptq.scheme=W4A16"],
    "lqer": ["lqer.scheme=W3A8", "lqer.rank=4"],
    "bdq": ["bdq.scheme=W4A4KV4"],
    "bdq-gptq": ["bdq.scheme=W4A4", "bdq.quantizer=none", "gptq.scheme=W4A4"],
    "dam": ["dam.scheme=W4A8", "dam.latent_bits=8", "dam.learn.steps=3"],
    "dam-gptq": ["dam.scheme=W4A16", "dam.quantizer=none", "dam.learn.steps=3", "gptq.scheme=W4A16"],
    "dam-bdq": ["dam.scheme=W4A4", "dam.quantizer=none", "dam.learn.steps=3", "bdq.scheme=W4A4"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


def words(model: Path, output: Path, chain: list[str]) -> list[str]:
    plugins = dict.fromkeys(one.partition(".")[0] for one in chain)
    return [
        *("transform", f"--model={model}", f"--output={output}"),
        *(f"--plugin={name}" for name in plugins),
        *(f"--set=plugins.{one}" for one in chain if "." in one),
        *(f"--set=transform.{key}={value}" for key, value in TEXTS.items()),
    ]


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_what_is_written_is_what_was_measured(
    trainer: Any, model: Path, tmp_path: Path, chain: list[str]
) -> None:
    outcome = trainer(*words(model, tmp_path / "run", chain))
    assert outcome.code == 0, outcome.err
    result = json.loads((tmp_path / "run/result.json").read_text())
    loaded = load_model(str(tmp_path / "run"))
    options = TransformOptions.model_validate(TEXTS)
    tokens = read_windows(options, None, load_model(str(model)).config, result["seed"]).evaluation[0]  # type: ignore[arg-type]
    with evaluating(loaded):
        logits = loaded(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    assert nll.view(len(tokens), -1).mean(1).tolist() == pytest.approx(result["items"]["nll"], abs=1e-6)
    assert math.isfinite(result["metrics"]["delta_nll"])
    bits = result["metrics"]["bits_per_weight"]
    assert bits < 32


def test_rounded_weights_are_not_factorised(trainer: Any, model: Path, tmp_path: Path) -> None:
    outcome = trainer(*words(model, tmp_path / "run", ["bdq.scheme=W4A4", "dam.scheme=W4A16"]))
    assert outcome.code == 2
    assert "dam" in outcome.err
    assert not (tmp_path / "run/model").exists()


def test_two_methods_that_round_are_refused(trainer: Any, model: Path, tmp_path: Path) -> None:
    outcome = trainer(*words(model, tmp_path / "run", ["rtn.scheme=W4A16", "bdq.scheme=W4A4"]))
    assert outcome.code == 2
    assert not (tmp_path / "run/model").exists()


def test_a_transformed_model_writes_text(trainer: Any, model: Path, tmp_path: Path) -> None:
    assert trainer(*words(model, tmp_path / "run", CHAINS["bdq"])).code == 0
    outcome = trainer(
        "generate", "--model", str(tmp_path / "run"), "--prompt", "abc", "--set=max_new_tokens=4"
    )
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    "chain", [CHAINS["rtn"], ["rtn.scheme=W4A16"]], ids=["graftwork", "compressed-tensors"]
)
def test_rounded_weights_are_not_trained(
    trainer: Any, model: Path, stream: Path, tmp_path: Path, chain: list[str]
) -> None:
    assert trainer(*words(model, tmp_path / "run", chain)).code == 0
    outcome = trainer(
        "train", "--model", str(tmp_path / "run"), "--data", str(stream), "--output", str(tmp_path / "t")
    )
    assert outcome.code == 2
    assert "holds rounded weights" in outcome.err
