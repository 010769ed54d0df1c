"""The score matrix of a stream while it grows: which cells to fill, when, and what follows from them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.data.prompts import leaks
from graftwork.data.stream import held_out_tasks
from graftwork.evaluate import continual
from graftwork.evaluate.answers import score_task
from graftwork.evaluate.perplexity import perplexity

if TYPE_CHECKING:
    from graftwork.console import Console
    from graftwork.data.tasks import Task
    from graftwork.run import Run
    from graftwork.train.adapters import AdapterStack


class Scores:
    """Accuracy of every task after every task; row 0 is the untouched model.

    ``matrix[i][j]`` is the score (0 to 1) on task j after i tasks, None where it was not measured;
    ``items[i][j]`` the per-item correctness behind it.
    """

    def __init__(self, run: Run, tasks: list[Task], tokenizer: Any, console: Console) -> None:
        self.run = run
        self.options = run.job.evaluate
        self.tasks = tasks
        self.tokenizer = tokenizer
        self.console = console
        self.seconds = 0.0
        rows, columns = len(tasks) + 1, len(tasks)
        self.matrix: list[list[float | None]] = [[None] * columns for _ in range(rows)]
        self.invalid: list[list[float | None]] = [[None] * columns for _ in range(rows)]
        self.items: list[list[list[int] | None]] = [[None] * columns for _ in range(rows)]
        self.general: dict[str, dict[str, float]] = {}
        self.general_items: dict[str, dict[str, list[int]]] = {}
        wanted = self.options.general.tasks
        self.held_out = (
            held_out_tasks(
                run.job.data,
                wanted,
                seed=run.seed,
                tokenizer=tokenizer,
                sources=run.plugins.data_sources(run),
            )
            if wanted
            else []
        )

    def before(self, stack: AdapterStack) -> None:
        """Measure the untouched model."""
        if self.options.cells == "all":
            self._row(0, range(len(self.tasks)), stack)
        elif self.options.cells == "seen":
            self._row(0, range(1), stack)
        self._general("before", stack)

    def after(self, index: int, stack: AdapterStack) -> None:
        """Measure after the task ``index`` (from 0) was learned."""
        last = index == len(self.tasks) - 1
        if stack.policy == "separate":
            # Every task has a model of its own, which never changes again.
            columns = range(len(self.tasks)) if last else range(index, index + 1)
        elif self.options.cells == "all" or last:
            columns = range(len(self.tasks))
        elif self.options.cells == "seen":
            # One task ahead, which forward transfer is defined by.
            columns = range(index + 2)
        elif self.options.cells == "ends":
            columns = range(index, index + 1)
        else:
            columns = range(0)
        self._row(index + 1, columns, stack)

    def finish(self, stack: AdapterStack) -> None:
        """Measure general ability once the stream is over."""
        self._general("after", stack)

    def _row(self, row: int, columns: range, stack: AdapterStack) -> None:
        started = time.perf_counter()
        for column in columns:
            task = self.tasks[column]
            if task.test is None:
                continue
            stack.use_for(task.name)
            score = self._score(task, stack.model)
            self.matrix[row][column] = score.accuracy
            self.invalid[row][column] = score.invalid
            self.items[row][column] = [int(value) for value in score.correct]
            self.run.events.write(
                "score", after=row, task=task.name, accuracy=score.accuracy, invalid=score.invalid
            )
        self.seconds += time.perf_counter() - started
        known = [value for value in self.matrix[row] if value is not None]
        if known:
            stage = "before training" if row == 0 else f"after {self.tasks[row - 1].name}"
            cells = "  ".join(
                f"{task.name} {100 * value:.1f}"
                for task, value in zip(self.tasks, self.matrix[row], strict=True)
                if value is not None
            )
            self.console.say(f"  {stage:<24} {cells}")

    def _score(self, task: Task, model: Any) -> Any:
        plugins, run = self.run.plugins, self.run
        processors = [
            item for _, many in plugins.call("logits_processors", run=run, model=model) for item in many
        ]
        with self.console.bar(len(task.test or []), f"score {task.name}") as bar:
            return score_task(
                model,
                self.tokenizer,
                task,
                batch_size=self.options.batch_size,
                max_new_tokens=self.options.max_new_tokens,
                logits_processors=processors,
                contexts=lambda: [c for _, c in plugins.call("generation_context", run=run, model=model)],
                progress=bar.update,
            )

    def _general(self, when: str, stack: AdapterStack) -> None:
        started = time.perf_counter()
        values: dict[str, float] = {}
        items: dict[str, list[int]] = {}
        general = self.options.general
        if general.text:
            with self.console.bar(None, "perplexity", "window") as bar:
                values["perplexity"] = perplexity(
                    stack.model,
                    self.tokenizer,
                    Path(general.text),
                    window=general.window,
                    max_windows=general.windows,
                    progress=bar.update,
                )["perplexity"]
        for task in self.held_out:
            score = self._score(task, stack.model)
            values[task.name] = score.accuracy
            items[task.name] = [int(value) for value in score.correct]
        if values:
            self.general[when], self.general_items[when] = values, items
            self.run.events.write("general", when=when, **values)
        self.seconds += time.perf_counter() - started

    # ------------------------------------------------------------------ what a stage keeps, what a run shows

    def to_json(self) -> dict[str, Any]:
        return {
            "matrix": self.matrix,
            "invalid": self.invalid,
            "items": self.items,
            "general": self.general,
            "general_items": self.general_items,
        }

    def restore(self, record: Mapping[str, Any], seconds: float) -> None:
        """Take back what :meth:`to_json` gave."""
        self.matrix, self.invalid, self.items = record["matrix"], record["invalid"], record["items"]
        self.general, self.general_items = dict(record["general"]), dict(record["general_items"])
        self.seconds = seconds

    def result(self) -> dict[str, Any]:
        """Return matrices and metrics for ``result.json``."""
        scored = any(value is not None for row in self.matrix for value in row)
        metrics = continual.metrics(self.matrix) if scored else {}
        if self.held_out and "after" in self.general:
            before, after = self.general["before"], self.general["after"]
            names = [task.name for task in self.held_out]
            metrics["unseen"] = continual.unseen([before[n] for n in names], [after[n] for n in names])
        return {
            "scores": self.matrix if scored else [],
            "invalid": self.invalid if scored else [],
            "items": self.items if scored else [],
            "metrics": metrics,
            "general": self.general,
            "general_items": self.general_items,
            "leaks": leaks(self.run.job.data),
            "eval_seconds": round(self.seconds, 3),
        }
