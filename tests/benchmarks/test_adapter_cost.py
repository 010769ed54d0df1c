"""What the adapters of the plugins cost in a training step, against LoRA and full weights; statistics of a task."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from adapted import ADAPTERS, BATCH, SHAPE, build, build_run
from graftwork.data.tasks import Task
from graftwork.evaluate.modes import evaluating
from graftwork.train.statistics import task_batches
from measured import in_pairs
from turns import train_in_turns

pytestmark = pytest.mark.slow
STEPS, WARMUP, LIMIT = 35, 5, 1.10
NAMES = {name: f"{words}, {SHAPE}" for name, words in ADAPTERS.items()}


@pytest.mark.parametrize(
    ("method", "peer", "limit"),
    [("sparta", "lora", LIMIT), ("parsp", "full", 1.10), ("parsp", "lora", 1.25)],
)
def test_step_time(method: str, peer: str, limit: float, record: Any, tmp_path: Path) -> None:
    trainers = [build(name, tmp_path / name, steps=STEPS) for name in (method, peer)]
    seconds, unit = train_in_turns(trainers, warmup=WARMUP, label=f"step time, {method} and {peer}")
    record("step_time", (NAMES[method], seconds[0]), (NAMES[peer], seconds[1]), limit=limit, unit=unit)


def test_statistics_time(record: Any, tmp_path: Path) -> None:
    """All that PaRSP does at a task's end, eigenvectors included, against one forward pass over the task's items."""
    run, trainer = build_run("parsp", tmp_path, steps=STEPS)
    task = Task("task1", trainer.train_dataset, index=1, total=2)

    def statistics() -> float:
        started = time.perf_counter()
        run.plugins.call("task_end", run=run, task=task, trainer=trainer)
        return time.perf_counter() - started

    def forward() -> float:
        started = time.perf_counter()
        with evaluating(trainer.model):
            for batch in task_batches(trainer, batch_size=BATCH):
                trainer.model(**batch)
        return time.perf_counter() - started

    sides = in_pairs(statistics, forward, pairs=5, warmup=1, label="statistics")
    record(
        "statistics_time",
        (f"PaRSP at a task's end, {STEPS * BATCH} items", sides[0]),
        ("one epoch forward", sides[1]),
        limit=1.0,
        unit="s",
    )


def test_peak_memory(record: Any) -> None:
    """Each run in a process of its own: the peak over some steps, with the model, without the libraries."""
    sides = in_pairs(
        lambda: peak_mebibytes("sparta"),
        lambda: peak_mebibytes("lora"),
        pairs=3,
        warmup=0,
        label="peak memory",
    )
    record("peak_memory", (NAMES["sparta"], sides[0]), (NAMES["lora"], sides[1]), limit=LIMIT, unit="MiB")


def peak_mebibytes(name: str) -> float:
    script = Path(__file__).with_name("adapted.py")
    done = subprocess.run([sys.executable, str(script), name], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])
