"""A stream under DeepSpeed ZeRO-2, two processes on the CPU, computes what data-parallel training computes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.testing.runs import call_trainer
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="DeepSpeed is not installed; `make slow` brings it",
    ),
]
CONFIG = Path(__file__).parent.parent / "recipes/deepspeed/zero2.json"
ARMS = {
    "lora": ["adapter.peft_type=LORA", "adapter.r=2", "adapter.target_modules=all-linear"],
    "parsp": ["plugins.parsp.density=0.25"],
}
SETTINGS = [
    "train.max_steps=4",
    "train.learning_rate=1e-2",
    # As in test_distributed.py: what is near zero must not be blown up.
    "train.adam_epsilon=1e-5",
    "train.per_device_train_batch_size=2",
    "train.gradient_accumulation_steps=2",
    "train.logging_steps=1",
    "train.save_strategy=no",
    "evaluate.max_new_tokens=2",
]


def run(arm: str, extra: list[str], checkpoint: Path, stream: Path, output: Path, folder: Path) -> None:
    words = ["train", "--model", str(checkpoint), "--data", str(stream), "--output", str(output)]
    words += ["--plugin", arm] if arm in ("parsp",) else []
    words += [word for setting in (*SETTINGS, *ARMS[arm], *extra) for word in ("--set", setting)]
    # Its own folder for compiled operations: a build that was killed leaves a lock that others wait for.
    done = call_trainer(words, processes=2, env={"TORCH_EXTENSIONS_DIR": str(folder)})
    assert done.returncode == 0, done.stderr[-3000:]


def logs(output: Path) -> list[dict[str, Any]]:
    events = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == "log"]


@pytest.mark.parametrize("arm", ARMS)
def test_zero_2_equals_data_parallel(
    arm: str, checkpoint: Path, stream: Path, tmp_path: Path, extensions: Path
) -> None:
    run(arm, [], checkpoint, stream, tmp_path / "ddp", extensions)
    run(arm, [f"train.deepspeed={CONFIG}"], checkpoint, stream, tmp_path / "zero", extensions)
    before, after = logs(tmp_path / "ddp"), logs(tmp_path / "zero")
    assert len(before) == len(after) == 8
    for plain, sharded in zip(before, after, strict=True):
        assert sharded["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert sharded["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    name = "adapter/adapter_model.safetensors"
    mine, theirs = load_file(tmp_path / "ddp" / name), load_file(tmp_path / "zero" / name)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-5)
    moved = [key for key in mine if mine[key].is_floating_point() and mine[key].abs().sum() > 0]
    assert moved
