"""Time and memory per task must not grow with the number of tasks that came before.

What a method stores per task may grow: SpaRTA's router keeps 3 more rows of A and K per branch, here 9 KiB a task, and
PaRSP a relevance per neuron, here 7 KiB a task; the limits leave room for that, and what is added per task must not
grow itself. Time is what the process computed between the ends of two tasks
(trainer, tokenisation, steps, saving), the least of five tasks, because other programs can only add to it.
Memory is the peak of the whole process since the last task, resident on a CPU, allocated on a GPU. Scores are
taken only after the last task, since their number grows by design.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from graftwork.testing.data import tiny_stream
from graftwork.testing.models import tiny_checkpoint
from graftwork.testing.packages import install_plugin
from graftwork.testing.runs import call_trainer

pytestmark = pytest.mark.slow
LONG = 50
# SpaRTA's router needs 3 orthogonal rows per task, so 50 tasks need 150 dimensions.
MODEL = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 4}
SETTINGS = {
    "data": {"test_items": 2},
    "train": {
        "max_steps": 10,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "save_strategy": "no",
    },
    "evaluate": {"cells": "final", "max_new_tokens": 1},
}
METHODS = {
    "LoRA": {"adapter": {"peft_type": "LORA", "r": 10, "target_modules": "all-linear"}},
    "SpaRTA": {"plugins": {"sparta": {"components": 3}}},
    "PaRSP": {"plugins": {"parsp": {}}},
    "EWC": {
        "adapter": {"peft_type": "LORA", "r": 10, "target_modules": "all-linear"},
        "plugins": {"ewc": {"fisher_items": 8}},
    },
}
# These keep something besides the adapter.
STATEFUL = ("PaRSP", "EWC")


def stream(method: str, tasks: int, folder: Path) -> list[dict[str, Any]]:
    """Run a stream in a process of its own; return what the stopwatch noted after every task."""
    data = tiny_stream(folder / "data", [f"task{number:02d}" for number in range(tasks)], train=40, test=2)
    install_plugin(folder / "site", "stopwatch", "stopwatch:Stopwatch")
    recipe = {**SETTINGS, **METHODS[method], "model": str(tiny_checkpoint(folder / "model", **MODEL))}
    recipe["data"] = {**SETTINGS["data"], "source": str(data)}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    path = os.pathsep.join([str(folder / "site"), str(Path(__file__).parent)])
    print(f"{method}: a stream of {tasks} tasks ...", file=sys.stderr)
    done = call_trainer(
        ["run", str(folder / "recipe.yaml"), "--plugin", "stopwatch", "--output", str(folder / "run")],
        env={"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    (metrics,) = (folder / "run").rglob("metrics.jsonl")
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    noted = [event for event in events if event["event"] == "stopwatch"]
    stages = sorted(metrics.parent.glob("stages/*/stage.json"), key=lambda path: path.parent.name)
    return [
        {**event, "state": json.loads(stage.read_text())["state_bytes"]}
        for event, stage in zip(noted, stages, strict=True)
    ]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_grows_with_the_stream(method: str, record: Any, tmp_path: Path) -> None:
    """Compare the end of a long stream with its first tasks and with a short stream."""
    short, long = (stream(method, tasks, tmp_path / str(tasks)) for tasks in (5, LONG))
    # The first task is left out: it pays for starting up.
    seconds = [event["seconds"] for event in long[1:]]
    peaks = [[event["peak"] / 2**20 for event in noted] for noted in (short, long)]
    last = f"{method}, tasks {LONG - 4}-{LONG} of {LONG}"
    record(
        "stream_time",
        (last, [min(seconds[-5:])]),
        ("tasks 2-6", [min(seconds[:5])]),
        limit=1.10,
        unit="CPU s",
    )
    record("stream_memory", (last, peaks[1][-5:]), ("tasks 1-5 of 5", peaks[0]), limit=1.02, unit="MiB")
    if method in STATEFUL:
        states = [event["state"] / 1024 for event in long]
        added = [after - before for before, after in itertools.pairwise(states)]
        record(
            "stream_state",
            (f"{method}, KiB kept after task {LONG}", [states[-1]]),
            (
                "kept after task 1, and what task 2 added for every later one",
                [states[0] + (LONG - 1) * added[0]],
            ),
            limit=1.01,
            unit="KiB",
        )
