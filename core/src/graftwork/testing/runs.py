"""Run tiny jobs in a test, in this process or in one of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwork.console import Console
from graftwork.recipe import Recipe, expand
from graftwork.yaml_lines import Document

TINY_TRAIN = {
    "max_steps": 6,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
}


def tiny_recipe(model: Path | str, data: Path | str, **settings: Any) -> Recipe:
    """Return a recipe of one short job; ``settings`` are further top-level keys, ``train`` merges."""
    train = {**TINY_TRAIN, **settings.pop("train", {})}
    source = data if isinstance(data, dict) else {"source": str(data)}
    tree = {
        "model": str(model),
        "data": {**source, **settings.pop("data_options", {})},
        "train": train,
        **settings,
    }
    return expand(Document(tree, {}, "test"))


def run_tiny(recipe: Recipe, directory: Path, **options: Any) -> dict[str, Any]:
    """Run the only job of ``recipe`` in ``directory``, quietly, and return its result."""
    from graftwork.train.job import run_job

    return run_job(recipe.jobs[0], directory, console=Console(enabled=False), **options)


def losses(directory: Path) -> list[tuple[str, int, float]]:
    """Return (task, step, loss) of every logged step of a run."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [(e["task"], e["step"], e["loss"]) for e in events if e["event"] == "log"]


def trainer_command(arguments: Sequence[str], processes: int = 1) -> list[str]:
    """Return the command line of ``trainer`` in a process of its own, or in several under torchrun."""
    if processes == 1:
        return [sys.executable, "-m", "graftwork", *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [
        *launcher,
        "--master_port",
        "0",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        "-m",
        "graftwork",
        *arguments,
    ]


def call_trainer(
    arguments: Sequence[str],
    *,
    processes: int = 1,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``trainer`` to its end and return what it printed."""
    return subprocess.run(
        trainer_command(arguments, processes),
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )


def kill_when(arguments: Sequence[str], ready: Callable[[], bool], *, timeout: float = 300) -> None:
    """Start ``trainer`` and kill it (signal 9) as soon as ``ready`` says so.

    Raises:
        AssertionError: it ended by itself, or was not ready in time.
    """
    process = subprocess.Popen(
        trainer_command(arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + timeout
    try:
        while not ready():
            assert process.poll() is None, (
                f"ended before it was to be killed: {(process.stderr or sys.stdin).read()}"
            )
            assert time.monotonic() < deadline, "was not ready to be killed in time"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
