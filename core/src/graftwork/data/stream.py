"""Make a stream of tasks from what lies on disk: drawn, rendered, numbered."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from graftwork.data.layouts import RawTask, read_tasks
from graftwork.data.options import DataOptions
from graftwork.data.prompts import render
from graftwork.data.tasks import Task
from graftwork.errors import UserError


def build_stream(options: DataOptions, *, seed: int) -> list[Task]:
    """Return the tasks of ``options.source`` in their order, drawn with ``seed`` (or ``draw_seed``).

    Raises:
        UserError: see :func:`graftwork.data.layouts.read_tasks`; also for an empty draw.
    """
    raw = read_tasks(options.source, options.order)
    return [_task(task, index, len(raw), options, seed) for index, task in enumerate(raw)]


def held_out_tasks(options: DataOptions, names: Sequence[str], *, seed: int) -> list[Task]:
    """Return tasks of the same source that the stream does not train on.

    Raises:
        UserError: one of them is in the stream, or has no test items.
    """
    order = options.order or []
    for name in names:
        if name in order or not order:
            raise UserError(
                f"evaluate.general.tasks names '{name}', which the stream trains on; leave it out of one"
            )
    tasks = build_stream(options.model_copy(update={"order": list(names)}), seed=seed)
    for task in tasks:
        if task.test is None:
            raise UserError(f"evaluate.general.tasks names '{task.name}', which has no test items")
    return tasks


def _task(raw: RawTask, index: int, total: int, options: DataOptions, seed: int) -> Task:
    notes = list(raw.notes)
    overlap = _overlap(raw)
    if overlap and options.overlap == "refuse":
        raise UserError(
            f"task '{raw.name}': {overlap} test items also stand in its training items, word for word"
        )
    if overlap:
        notes.append(f"{raw.name}: {overlap} test items also stand in the training items, word for word")
    chosen = options.draw_seed if options.draw_seed is not None else seed
    train = _draw(raw.train, options.train_items, f"{chosen}/{raw.name}/train")
    test = None if raw.test is None else _draw(raw.test, options.test_items, f"{chosen}/{raw.name}/test")
    return Task(
        name=raw.name,
        train=_dataset(render(raw, train, options), keep_label=False),
        test=None if test is None else _dataset(render(raw, test, options), keep_label=True),
        labels=raw.labels,
        index=index,
        total=total,
        notes=notes,
    )


def _draw(items: list[dict[str, Any]], count: int | None, seed: str) -> list[dict[str, Any]]:
    if count is None or count >= len(items):
        return items
    return random.Random(seed).sample(items, count)


def _overlap(raw: RawTask) -> int:
    if raw.form != "classification" or raw.test is None:
        return 0
    known = {item["sentence"].strip() for item in raw.train}
    return sum(item["sentence"].strip() in known for item in raw.test)


def _dataset(rows: list[dict[str, Any]], keep_label: bool) -> Dataset:
    if not keep_label:
        rows = [{key: value for key, value in row.items() if key != "label"} for row in rows]
    return Dataset.from_list(rows)
