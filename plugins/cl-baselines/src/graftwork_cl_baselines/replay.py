"""Replay: mix items of earlier tasks into the current one. Not rehearsal-free; an upper reference."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from datasets import Dataset, concatenate_datasets
from graftwork import hookimpl
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from graftwork.data.tasks import Task
    from graftwork.run import Run
    from transformers import Trainer


class ReplayOptions(BaseModel):
    """Options of replay."""

    model_config = ConfigDict(extra="forbid")

    share: float = Field(
        0.1,
        gt=0,
        le=1,
        description="items kept of every past task, as a share of its training items (TRACE: 0.1)",
    )


class Replay:
    """Keep a share of every task's items and train on them again with each later task.

    The rule is that of TRACE (10 % of each past task). What is kept is drawn with the run's seed, so a
    resumed run keeps the same items; the buffer is part of the checkpoint and counts as extra state.
    """

    Options = ReplayOptions
    sharding = frozenset({"zero2", "zero3", "fsdp2"})

    def __init__(self, options: ReplayOptions) -> None:
        self.options = options
        self.buffer: list[dict] = []
        self.pending: list[dict] = []

    @hookimpl
    def training_data(self, run: Run, task: Task, dataset: Dataset) -> Dataset | None:
        self.pending = draw(dataset, self.options.share, seed=run.seed + task.index)
        if not self.buffer:
            return None
        return concatenate_datasets([dataset, Dataset.from_list(self.buffer, features=dataset.features)])

    @hookimpl
    def task_end(self, run: Run, task: Task, trainer: Trainer) -> None:
        self.buffer += self.pending
        self.pending = []

    @hookimpl
    def save_state(self, run: Run) -> Mapping[str, torch.Tensor]:
        text = json.dumps(self.buffer).encode()
        return {"buffer": torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    @hookimpl
    def load_state(self, run: Run, state: Mapping[str, torch.Tensor]) -> None:
        if "buffer" in state:
            self.buffer = json.loads(bytes(state["buffer"].tolist()).decode())


def draw(dataset: Dataset, share: float, seed: int) -> list[dict]:
    """Return ``ceil(share * len(dataset))`` items of ``dataset``, drawn without replacement."""
    count = -int(-share * len(dataset) // 1)
    return dataset.shuffle(seed=seed).select(range(count)).to_list()
