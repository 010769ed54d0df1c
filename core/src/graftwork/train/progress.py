"""The Trainer's steps as a progress bar and as events of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from graftwork.console import Console
    from graftwork.data.tasks import Task
    from graftwork.run import Run


class Progress(TrainerCallback):
    """Show steps and loss; write every log line of the trainer to ``metrics.jsonl``."""

    def __init__(self, run: Run, task: Task, console: Console) -> None:
        self.run = run
        self.task = task
        self.console = console
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        label = f"train {self.task.name} ({self.task.index + 1}/{self.task.total})"
        self.bar = self.console.bar(state.max_steps, label, "step")
        self.bar.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        numbers = {key: value for key, value in logs.items() if isinstance(value, int | float)}
        self.run.events.write("log", task=self.task.name, step=state.global_step, **numbers)
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
