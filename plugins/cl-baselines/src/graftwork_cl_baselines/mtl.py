"""Multi-task training: every slice of the stream is a mixture of all tasks. An upper bound, no continual learning."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from datasets import Dataset, concatenate_datasets
from graftwork import UserError, hookimpl
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graftwork.data.tasks import Task
    from graftwork.run import Run


class MtlOptions(BaseModel):
    """Multi-task training has no options."""

    model_config = ConfigDict(extra="forbid")


class Mtl:
    """Train on the shuffled items of all tasks at once, in as many steps as the stream has."""

    Options = MtlOptions
    sharding = frozenset({"zero2", "zero3", "fsdp2"})

    def __init__(self, options: MtlOptions) -> None:
        self.options = options

    @hookimpl
    def check(self, run: Run) -> None:
        players = run.plugins.implements("self_play")
        if players:
            raise UserError(
                f"plugins 'mtl' and '{players[0]}' cannot be combined: the one joins the items of several tasks (hook "
                f"task_stream), and the other learns from one (hook self_play); leave one of them out"
            )

    @hookimpl
    def task_stream(self, run: Run, tasks: Sequence[Task]) -> Sequence[Task]:
        first = tasks[0]
        for task in tasks[1:]:
            if task.train.features != first.train.features:
                raise UserError(
                    f"plugin 'mtl' joins the items of all tasks and those of '{first.name}' and '{task.name}' have "
                    f"different columns ({_columns(first.train)}; {_columns(task.train)}); put only tasks of "
                    f"one form into data.order"
                )
        slices = mixed([task.train for task in tasks], run.seed)
        return [dataclasses.replace(task, train=part) for task, part in zip(tasks, slices, strict=True)]


def mixed(parts: Sequence[Dataset], seed: int) -> list[Dataset]:
    """Return all items, shuffled with ``seed`` and cut into slices as long as ``parts``."""
    joint = concatenate_datasets(list(parts)).shuffle(seed=seed)
    slices, start = [], 0
    for part in parts:
        slices.append(joint.select(range(start, start + len(part))))
        start += len(part)
    return slices


def _columns(dataset: Dataset) -> str:
    return ", ".join(f"{name} {_type(feature)}" for name, feature in sorted(dataset.features.items()))


def _type(feature: object) -> str:
    return getattr(feature, "dtype", type(feature).__name__)
