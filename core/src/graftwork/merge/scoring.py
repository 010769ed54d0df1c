"""How well a model does the tasks of each expert, item by item; what never changes is kept for later runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field

from graftwork.console import Console
from graftwork.data.options import DataOptions
from graftwork.data.stream import build_stream
from graftwork.data.tasks import Task
from graftwork.errors import UserError
from graftwork.evaluate.answers import score_task
from graftwork.evaluate.continuations import answer_pair, first_choices
from graftwork.files import cache_folder, write_json_atomic
from graftwork.models import load_model, resolve

if TYPE_CHECKING:
    from graftwork.run import Run


class ScoringOptions(BaseModel):
    """Which items are scored, and how."""

    model_config = ConfigDict(extra="forbid")

    data: DataOptions
    validation: int = Field(
        100,
        ge=1,
        description="training items per task to choose settings by; not those that experts were trained on",
    )
    scoring: Literal["likelihood", "generate"] = Field(
        "likelihood",
        description="the likeliest label is the answer, and where answers are no labels, the share of their tokens "
        "that are the model's first choice; or what the model writes",
    )
    answer_tokens: int = Field(
        64, ge=1, description="of an answer that is no label, so many tokens are looked at"
    )
    batch_size: int = Field(25, ge=1, description="prompts that are answered together")
    max_new_tokens: int = Field(8, ge=1, description="longest written answer, in tokens")


@dataclass(frozen=True)
class Questions:
    """The tasks of every expert, each with the items that are scored, and what is to be told of them."""

    tasks: Mapping[str, Sequence[Task]]
    options: ScoringOptions
    notes: tuple[str, ...] = ()

    def score(self, model: Any, tokenizer: Any, expert: str, console: Console, label: str) -> list[float]:
        """Return a score in [0, 1] for every item of the expert's tasks: answered or not, or a share of tokens."""
        found: list[float] = []
        tasks = self.tasks[expert]
        with console.bar(sum(len(task.test or ()) for task in tasks), label) as bar:
            for task in tasks:
                if self.options.scoring == "likelihood" and not task.labels:
                    found += self._shares(model, tokenizer, task, bar.update)
                    continue
                scored = score_task(
                    model,
                    tokenizer,
                    task,
                    scoring=self.options.scoring,
                    batch_size=self.options.batch_size,
                    max_new_tokens=self.options.max_new_tokens,
                    progress=bar.update,
                )
                found += [float(one) for one in scored.correct]
        return found

    def _shares(self, model: Any, tokenizer: Any, task: Task, progress: Any) -> list[float]:
        """Return for every item the share of its answer's tokens that the model would have chosen first."""
        pairs = []
        for row in task.test.to_list() if task.test is not None else []:
            prompt, answer = answer_pair(tokenizer, row["prompt"], row["completion"])
            pairs.append((prompt, answer[: self.options.answer_tokens]))
        chosen = first_choices(model, tokenizer, pairs, batch_size=self.options.batch_size, progress=progress)
        return [sum(one) / len(one) for one in chosen]

    def reference(
        self, ref: str, dtype: str, model: Any, tokenizer: Any, expert: str, console: Console
    ) -> list[float]:
        """Return the scores of a model as it is, measured once per model and items.

        ``model`` is it, if it is loaded already; else it is loaded from ``ref``.
        """
        path = self._path(ref, dtype, expert)
        if path is not None and path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))["scores"]
        loaded = model if model is not None else _loaded(ref, dtype)
        scores = self.score(loaded, tokenizer, expert, console, f"score {Path(ref).name}")
        if path is not None:
            write_json_atomic(path, {"scores": scores})
        return scores

    def _path(self, ref: str, dtype: str, expert: str) -> Path | None:
        """Return where scores are kept: by the model's files (names, sizes, times), precision, and items."""
        folder = resolve(ref).folder
        if folder is None:
            return None
        files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
        stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        how = self.options.model_dump(exclude={"data", "validation", "batch_size"})
        key = hashlib.sha256(
            json.dumps([str(folder.resolve()), stamps, dtype, how, torch.__version__]).encode()
        )
        for task in self.tasks[expert]:
            key.update(
                json.dumps([task.labels, task.test.to_list() if task.test is not None else []]).encode()
            )
        return cache_folder() / "scores" / f"{key.hexdigest()[:32]}.json"


def questions(
    options: ScoringOptions,
    asked: Mapping[str, tuple[DataOptions, Sequence[str] | None]],
    run: Run,
    tokenizer: Any,
    *,
    validation: bool,
) -> Questions:
    """Return the test items of every expert's tasks, or items to choose settings by.

    These are training items that ``data.train_items`` does not draw, so that experts trained with the same section
    have not seen them; where all are drawn, any of them.

    Args:
        options: of the scoring.
        asked: per expert, the data and the names of its tasks there (None: all).
        run: for its seed and the sources of its plugins.
        tokenizer: of the base.
        validation: items to choose settings by are asked for.

    Raises:
        UserError: see :func:`graftwork.data.stream.build_stream`; also for a task without items to score.
    """
    found: dict[str, list[Task]] = {}
    notes: list[str] = []
    for expert, (data, names) in asked.items():
        ordered = data if names is None else data.model_copy(update={"order": list(names)})
        given: dict[str, Any] = {
            "seed": run.seed,
            "tokenizer": tokenizer,
            "sources": run.plugins.data_sources(run),
        }
        tasks = build_stream(ordered, **given)
        if validation:
            whole = ordered.model_copy(update={"train_items": None})
            for task, drawn in zip(build_stream(whole, **given), tasks, strict=True):
                notes += _fresh(task, drawn, options.validation)
        for task in tasks:
            if task.test is None or not len(task.test):
                raise UserError(f"task '{task.name}' has no items to score expert '{expert}' on")
        found[expert] = tasks
    return Questions(found, options, tuple(dict.fromkeys(notes)))


def _fresh(whole: Task, task: Task, count: int) -> list[str]:
    """Make training items that ``task`` did not draw from ``whole`` its test items; return what is to be told."""
    drawn = {json.dumps(row) for row in task.train.to_list()}
    rows = whole.train.to_list()
    fresh = [row for row in rows if json.dumps(row) not in drawn]
    notes = []
    if not fresh:
        fresh = rows
        notes.append(
            f"{task.name}: settings were chosen on items that experts may have trained on; data.train_items draws all "
            f"there are"
        )
    # Spread over the file, which may be sorted by label.
    step = max(1, len(fresh) // count)
    task.test = Dataset.from_list(fresh[::step][:count])
    return notes


def _loaded(ref: str, dtype: str) -> Any:
    model = load_model(ref, dtype=dtype)
    device: Any = torch.accelerator.current_accelerator()
    return (model if device is None else model.to(device)).eval()
