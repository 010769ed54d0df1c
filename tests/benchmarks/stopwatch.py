"""A plugin that notes, at the end of every task, what the task has used."""

from __future__ import annotations

import time
from typing import Any

from graftwork import hookimpl, memory


class Stopwatch:
    """Seconds that the process computed, and its peak memory, both since the end of the last task."""

    def __init__(self, options: Any) -> None:
        del options
        self.started = time.process_time()

    @hookimpl
    def task_end(self, run: Any, task: Any) -> None:
        seconds, self.started = time.process_time() - self.started, time.process_time()
        run.events.write("stopwatch", task=task.name, seconds=seconds, peak=memory.peak_bytes())
        memory.reset_peak()
