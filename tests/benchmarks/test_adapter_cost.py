"""What SpaRTA costs in a training step, against LoRA with the same number of adapter parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from adapted import ADAPTERS, SHAPE, build
from measured import in_pairs
from turns import train_in_turns

pytestmark = pytest.mark.slow
STEPS, WARMUP, LIMIT = 35, 5, 1.10
NAMES = [f"{ADAPTERS[name]}, {SHAPE}" for name in ("sparta", "lora")]


def test_step_time(record: Any, tmp_path: Path) -> None:
    trainers = [build(name, tmp_path / name, steps=STEPS) for name in ("sparta", "lora")]
    seconds, unit = train_in_turns(trainers, warmup=WARMUP, label="step time, SpaRTA and LoRA")
    record("step_time", (NAMES[0], seconds[0]), (NAMES[1], seconds[1]), limit=LIMIT, unit=unit)


def test_peak_memory(record: Any) -> None:
    """Each run in a process of its own: the peak over some steps, with the model, without the libraries."""
    sides = in_pairs(
        lambda: peak_mebibytes("sparta"),
        lambda: peak_mebibytes("lora"),
        pairs=3,
        warmup=0,
        label="peak memory",
    )
    record("peak_memory", (NAMES[0], sides[0]), (NAMES[1], sides[1]), limit=LIMIT, unit="MiB")


def peak_mebibytes(name: str) -> float:
    script = Path(__file__).with_name("adapted.py")
    done = subprocess.run([sys.executable, str(script), name], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])
