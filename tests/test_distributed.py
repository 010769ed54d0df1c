"""Two processes compute what one process with twice the batch computes.

The completions differ in length, so a mean over processes instead of over tokens would show.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.testing.runs import call_trainer
from safetensors.torch import load_file

SETTINGS = [
    "train.max_steps=4",
    "train.learning_rate=1e-2",
    # Adam divides by the size of a gradient: without this it blows up the rounding of the smallest ones,
    # and hides a gradient of the wrong size.
    "train.adam_epsilon=1e-5",
    "train.gradient_accumulation_steps=2",
    "train.logging_steps=1",
    "train.save_strategy=no",
    "train.max_grad_norm=0.5",
    "evaluate.max_new_tokens=4",
    "plugins.sparta.block_layers=1",
    "plugins.sparta.rank_specific=4",
    "plugins.sparta.components=2",
    "plugins.sparta.lambda_orth=0.5",
    "plugins.sparta.mu=0.2",
    "plugins.sparta.shared_lr=0.5",
]


# The components' term is a difference of numbers close to one, squared: it keeps fewer digits.
TOLERANCE = {"loss": 1e-5, "grad_norm": 1e-4, "loss/orth": 1e-4, "loss/components": 1e-2}


def _words(checkpoint: Path, stream: Path, output: Path, batch: int) -> list[str]:
    words = ["train", "--model", str(checkpoint), "--data", str(stream), "--output", str(output)]
    settings = [*SETTINGS, f"train.per_device_train_batch_size={batch}"]
    return [*words, "--plugin", "sparta", *(word for setting in settings for word in ("--set", setting))]


def _events(root: Path, kind: str) -> list[dict[str, Any]]:
    lines = (root / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_two_processes_equal_one_with_twice_the_batch(
    trainer: Callable[..., Any], checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    outcome = trainer(*_words(checkpoint, stream, one, 4))
    assert outcome.code == 0, outcome.err
    done = call_trainer(_words(checkpoint, stream, two, 2), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]

    # Written once, by the main process, and whole.
    single, double = _events(one, "log"), _events(two, "log")
    assert [(event["task"], event["step"]) for event in double] == [
        (task, step) for task in ("colour", "fruit") for step in (1, 2, 3, 4)
    ]
    assert len(_events(two, "task")) == 2
    assert len(_events(two, "score")) == len(_events(one, "score")) == 6
    assert done.stdout.count("report:") == 1

    for before, after in zip(single, double, strict=True):
        for key in TOLERANCE:
            assert after[key] == pytest.approx(before[key], rel=TOLERANCE[key], abs=1e-8), (
                key,
                before,
                after,
            )
    assert any(event["loss/orth"] > 1e-6 for event in single)
    assert any(event["loss/components"] > 1e-6 for event in single)

    mine = load_file(one / "adapter/adapter_model.safetensors")
    theirs = load_file(two / "adapter/adapter_model.safetensors")
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(
            theirs[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    first, second = (json.loads((root / "result.json").read_text()) for root in (one, two))
    assert second["scores"] == first["scores"]
    assert json.loads((two / "manifest.json").read_text())["world_size"] == 2

    # Going on with another number of processes would be another run.
    (two / "result.json").unlink()
    refused = trainer(*_words(checkpoint, stream, two, 2), "--resume")
    assert refused.code == 2
    assert "was written by 2 processes, this run has 1" in refused.err
