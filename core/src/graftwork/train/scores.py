"""The score matrix of a stream while it grows: which cells to fill, when, and what follows from them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.data.prompts import leaks
from graftwork.data.stream import held_out_tasks
from graftwork.errors import UserError
from graftwork.evaluate import continual
from graftwork.evaluate.answers import Score, check_decoding, score_task
from graftwork.evaluate.likelihood import check_model, check_plugins
from graftwork.evaluate.perplexity import perplexity
from graftwork.generate.decoding import Decoding

if TYPE_CHECKING:
    from graftwork.console import Console
    from graftwork.data.tasks import Task
    from graftwork.recipe import EvaluateOptions
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

    def check(self, model: Any, adapter: Any) -> None:
        """Refuse a way of scoring that ``model`` (on the meta device), its ``adapter`` or the data do not offer."""
        if self.options.scoring == "generate":
            return
        check_model(model, adapter.config if adapter else None)
        check_labels([*self.tasks, *self.held_out])

    def before(self, stack: AdapterStack) -> None:
        """Measure the untouched model."""
        if any(task.test is not None for task in [*self.tasks, *self.held_out]):
            # The rest of the plugins' say is known: better now than after the training.
            check_decoding(Decoding.from_plugins(self.run, stack.model))
        if self.options.scoring == "likelihood":
            check_plugins(self.run, stack.model)
            for note in self.notes():
                self.console.say(f"  {note}")
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
            score = self._score(task, stack.model, learned=row)
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

    def _score(self, task: Task, model: Any, *, learned: int) -> Score:
        """Score ``task`` with a model that has learned the first ``learned`` tasks."""
        if self.options.scoring == "likelihood":
            check_plugins(self.run, model)
        with self.console.bar(len(task.test or []), f"score {task.name}") as bar:
            return score_task(
                model,
                self.tokenizer,
                task,
                scoring=self.options.scoring,
                candidates=candidates(task, self.tasks[:learned], self.options.candidates),
                batch_size=self.options.batch_size,
                max_new_tokens=self.options.max_new_tokens,
                decoding=Decoding.from_plugins(self.run, model),
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
            learned = len(self.tasks) if when == "after" else 0
            score = self._score(task, stack.model, learned=learned)
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

    def notes(self) -> list[str]:
        """Return how answers were chosen, in words, where they were not written."""
        tasks = [*self.tasks, *self.held_out]
        return scoring_notes(tasks, self.options, "all tasks learned so far")

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
            "scoring": self.options.scoring,
            "leaks": leaks(self.run.job.data) + scoring_leaks(self.options),
            "eval_seconds": round(self.seconds, 3),
        }


def candidates(task: Task, learned: Sequence[Task], choice: str) -> list[str]:
    """Return the labels that likelihood scoring chooses from: the task's own first, each once."""
    others = [label for other in learned for label in other.labels] if choice == "seen" else []
    return list(dict.fromkeys([*task.labels, *others]))


def check_labels(tasks: Sequence[Task]) -> None:
    """Raise ``UserError`` where likelihood scoring has no labels to choose from in any of ``tasks``."""
    scored = [task for task in tasks if task.test is not None]
    if scored and not any(task.labels for task in scored):
        raise UserError(
            "evaluate.scoring: likelihood chooses between a task's labels, and no task here has any; "
            "use evaluate.scoring: generate"
        )


def scoring_notes(tasks: Sequence[Task], options: EvaluateOptions, others: str) -> list[str]:
    """Return in words what counts as an answer, where it is not what the model writes.

    ``others`` says which tasks' labels compete with ``candidates: seen``.
    """
    if options.scoring == "generate":
        return []
    among = f"the labels of {others} and its own" if options.candidates == "seen" else "its task's labels"
    return [f"the answer to an item is the likeliest of {among}; nothing is written"] + [
        f"{task.name} has no labels and is scored by what the model writes"
        for task in tasks
        if task.test is not None and not task.labels
    ]


def scoring_leaks(options: EvaluateOptions) -> list[str]:
    """Return what the way of scoring gives away about the task, as :func:`leaks` does for the prompts."""
    own = options.scoring == "likelihood" and options.candidates == "task"
    return ["answers chosen among the task's own labels"] if own else []
