"""What the composed trainer costs where no plugin adds anything, against the trainer it is composed from."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from graftwork.console import Console
from graftwork.data.tasks import Task
from graftwork.recipe import Job
from graftwork.run import Run
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork.train.algorithms import algorithm, build_arguments
from graftwork.train.checkpoints import MarkCheckpoints
from graftwork.train.compose import Composition, compose
from graftwork.train.progress import Progress
from transformers import PrinterCallback, Trainer
from turns import train_in_turns

pytestmark = pytest.mark.slow
STEPS, WARMUP, BATCH, LENGTH = 300, 10, 4, 64
# Small enough that a step is bookkeeping as much as arithmetic: overhead shows more than on a real model.
MODEL = {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 256}


def rows(kind: str) -> Dataset:
    """Return texts of ``LENGTH`` tokens, one epoch of them, as each trainer wants them."""
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefgh ", k=LENGTH)) for _ in range(STEPS * BATCH)]
    if kind == "sft":
        return Dataset.from_dict({"text": texts})
    ids = tiny_tokenizer()(texts)["input_ids"]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def build(kind: str, data: Dataset, folder: Path, *, composed: bool) -> Trainer:
    chosen = algorithm(kind)
    fields = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "save_strategy": "no"}
    trainer = (compose(chosen.trainer) if composed else chosen.trainer)(
        model=tiny_model(**MODEL),
        args=build_arguments(chosen.config, fields, output_dir=str(folder), seed=0),
        train_dataset=data,
        processing_class=tiny_tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    if composed:
        # Everything that a job without plugins adds to its trainer.
        folder.mkdir(exist_ok=True)
        run = Run(folder, Job(model={"ref": "tiny"}, data={"source": "generated"}))
        trainer.add_callback(Progress(run, Task("task", data), Console(enabled=False)))
        trainer.add_callback(MarkCheckpoints(run, trainer, dict))
        trainer.attach(Composition.collect(run, trainer.model))
    return trainer


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_no_plugin_costs_nothing(kind: str, record: Any, tmp_path: Path) -> None:
    data = rows(kind)
    ours = build(kind, data, tmp_path / "ours", composed=True)
    bare = build(kind, data, tmp_path / "bare", composed=False)
    name = type(bare).__name__
    seconds, unit = train_in_turns([ours, bare], warmup=WARMUP, label=f"overhead over {name}")
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (ours, bare)]
    assert len(losses[0]) == STEPS / ours.args.logging_steps
    assert losses[0] == losses[1], "a run without plugins must compute what the bare trainer does, to the bit"
    weights = dict(bare.model.named_parameters())
    assert all(torch.equal(p, weights[key]) for key, p in ours.model.named_parameters())
    record("overhead", (f"composed {name}", seconds[0]), (name, seconds[1]), limit=1.01, unit=unit)
