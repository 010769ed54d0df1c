"""Self-play with every kind of weights: LoRA, SpaRTA, PaRSP, all of them; in bf16, accumulated, sharded, and killed in
the middle of every phase. Two processes are compared with one in test_distributed.py."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.testing.data import tiny_sums
from graftwork.testing.runs import call_trainer, kill_when, losses
from safetensors.torch import load_file

DEEPSPEED = Path(__file__).parent.parent / "recipes/deepspeed"
LORA = ["adapter.peft_type=LORA", "adapter.r=2", "adapter.target_modules=all-linear"]
WEIGHTS: dict[str, list[str]] = {
    "lora": LORA,
    "sparta": [
        "plugins.sparta.block_layers=1",
        "plugins.sparta.rank_specific=4",
        "plugins.sparta.components=2",
    ],
    "parsp": ["plugins.parsp.density=0.25"],
    "full": [],
}
SETTINGS = [
    "plugins.tpaw.iterations=2",
    "plugins.tpaw.players=2",
    "plugins.tpaw.rounds=2",
    "plugins.tpaw.writing.max_new_tokens=6",
    "plugins.tpaw.writing.batch_size=2",
    "train.max_steps=3",
    "train.learning_rate=1e-2",
    "train.adam_epsilon=1e-5",
    "train.max_length=64",
    "train.logging_steps=1",
    "train.save_strategy=no",
    "evaluate.max_new_tokens=6",
    "evaluate.batch_size=4",
]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sums(tmp_path_factory.mktemp("data") / "sums")


def words(checkpoint: Path, data: Path, output: Path, weights: str, *more: str) -> list[str]:
    plugins = ["--plugin", "tpaw", *(["--plugin", weights] if weights in ("sparta", "parsp") else [])]
    settings = [*SETTINGS, *WEIGHTS[weights], *more]
    return [
        "train",
        *("--model", str(checkpoint), "--data", str(data), "--output", str(output)),
        *plugins,
        *(word for setting in settings for word in ("--set", setting)),
    ]


def logs(output: Path) -> list[dict[str, Any]]:
    events = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == "log"]


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    (path,) = [*output.glob("adapter/*.safetensors"), *output.glob("model/*.safetensors")]
    return load_file(path)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_kind_of_weights_learns(
    trainer: Callable[..., Any], checkpoint: Path, sums: Path, tmp_path: Path, weights: str
) -> None:
    output = tmp_path / "run"
    outcome = trainer(*words(checkpoint, sums, output, weights, "train.per_device_train_batch_size=4"))
    assert outcome.code == 0, outcome.err
    first, second = logs(output)[0], logs(output)[3]
    # Before its first step the model is the newest player: no margin, and every target weighs eta.
    for event in (first, second):
        assert event["reward/margin"] == pytest.approx(0, abs=1e-4)
        assert event["boosted/age 0"] == 1
    assert second["player weight/age 0"] + second["player weight/age 1"] == pytest.approx(1)
    result = json.loads((output / "result.json").read_text())
    assert abs(result["metrics"]["target_drift"]) > 1e-3


def test_bf16_and_accumulation(
    trainer: Callable[..., Any], checkpoint: Path, sums: Path, tmp_path: Path
) -> None:
    small = ("train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2")
    runs = {
        "whole": ("train.per_device_train_batch_size=4",),
        "accumulated": small,
        "bf16": (*small, "train.bf16=true", "train.use_cpu=true"),
    }
    for name, more in runs.items():
        outcome = trainer(*words(checkpoint, sums, tmp_path / name, "lora", *more))
        assert outcome.code == 0, outcome.err
    whole, accumulated, rounded = (logs(tmp_path / name) for name in runs)
    for one, other, low in zip(whole, accumulated, rounded, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["reward/margin"] == pytest.approx(one["reward/margin"], abs=1e-4)
        assert low["loss"] == pytest.approx(one["loss"], rel=0.1)
    assert rounded[0]["reward/margin"] == pytest.approx(0, abs=5e-3)


# ---------------------------------------------------------------------- kill -9

PHASES: dict[str, str] = {
    "scoring": "rounds/log-probs/*/*.safetensors",
    "training": "stages/current/checkpoint-2/graftwork.json",
    "writing in iteration 2": "rounds/iteration-1/written/00000.json",
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_a_phase(
    trainer: Callable[..., Any], checkpoint: Path, sums: Path, tmp_path: Path, phase: str, unbroken: Path
) -> None:
    output = tmp_path / "run"
    asked = words(checkpoint, sums, output, "lora", *SAVING)
    kill_when(asked, lambda: bool(list(output.glob(PHASES[phase]))))
    assert not (output / "result.json").exists()
    outcome = trainer(*asked, "--resume")
    assert outcome.code == 0, outcome.err
    assert losses(output) == losses(unbroken)
    for number in (1, 2):
        name = f"rounds/iteration-{number}/pairs.parquet"
        assert (output / name).read_bytes() == (unbroken / name).read_bytes()
    for name, value in weights_of(unbroken).items():
        assert torch.equal(weights_of(output)[name], value)


SAVING = (
    "train.per_device_train_batch_size=4",
    "train.save_strategy=steps",
    "train.save_steps=1",
    # Long enough to be met in the act.
    "plugins.tpaw.writing.max_new_tokens=40",
)


@pytest.fixture(scope="module")
def unbroken(checkpoint: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "run"
    done = call_trainer(words(checkpoint, sums, output, "lora", *SAVING))
    assert done.returncode == 0, done.stderr[-3000:]
    return output


# ---------------------------------------------------------------------- DeepSpeed


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed; `make slow` brings it",
)
@pytest.mark.parametrize("weights", ["lora", "full"])
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_deepspeed_equals_data_parallel(
    checkpoint: Path, sums: Path, tmp_path: Path, extensions: Path, weights: str, config: str
) -> None:
    batch = "train.per_device_train_batch_size=2"
    for name, more in (("ddp", []), (config, [f"train.deepspeed={DEEPSPEED / config}.json"])):
        asked = words(checkpoint, sums, tmp_path / name, weights, batch, *more)
        # Its own folder for compiled operations: a build that was killed leaves a lock that others wait for.
        done = call_trainer(asked, processes=2, env={"TORCH_EXTENSIONS_DIR": str(extensions)})
        assert done.returncode == 0, done.stderr[-3000:]
    for plain, sharded in zip(logs(tmp_path / "ddp"), logs(tmp_path / config), strict=True):
        for key in ("loss", "reward/margin", "log-probability/target"):
            assert sharded[key] == pytest.approx(plain[key], rel=1e-3, abs=1e-4)
    mine, theirs = weights_of(tmp_path / "ddp"), weights_of(tmp_path / config)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-4)
