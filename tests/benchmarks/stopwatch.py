"""A plugin that notes, at the end of every task, what the task has used."""

from __future__ import annotations

import time
from typing import Any

import torch
from graftwork import hookimpl, memory
from graftwork.testing.models import tiny_model


class Stopwatch:
    """Computed seconds since the last task's end, those of a fixed piece of work, and the peak memory.

    The fixed work tells how fast the machine was at that moment: other programs slow both down.
    """

    def __init__(self, options: Any) -> None:
        del options
        self.model = tiny_model()
        self.started = time.process_time()

    @hookimpl
    def task_end(self, run: Any, task: Any) -> None:
        ended = time.process_time()
        peak = memory.peak_bytes()
        self.fixed_work()
        fixed = time.process_time() - ended
        run.events.write("stopwatch", task=task.name, seconds=ended - self.started, fixed=fixed, peak=peak)
        memory.reset_peak()
        self.started = time.process_time()

    def fixed_work(self, steps: int = 60) -> None:
        """Take gradients of a tiny model: as much Python as arithmetic, like the tasks."""
        ids = torch.arange(3, 203).reshape(4, 50)
        for _ in range(steps):
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.model.zero_grad()
