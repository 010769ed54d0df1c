"""What a run will need, before it starts: memory, disk and time; and how a bound on memory is kept to."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from graftwork.errors import UserError
from graftwork.transform.options import TransformOptions
from graftwork.transform.structure import find_layers, linears

GIB = 2**30
PROCESS = 0.75 * GIB
"""What the interpreter and the libraries take."""
SLACK = 1.15
"""Freed memory that the allocator keeps."""


@dataclass(frozen=True)
class Sizes:
    """What the estimate counts with, in numbers of values; ``item`` is the bytes of one.

    Attributes:
        layers: how many there are.
        layer: parameters of the largest.
        largest: of its largest linear.
        inputs: of the linear with most.
        widest: inputs or outputs of a linear, whichever are most.
        hidden, vocabulary: of the model.
        embedding: all parameters outside the layers.
        item: bytes per value.
        whole: all parameters.
    """

    layers: int
    layer: int
    largest: int
    inputs: int
    widest: int
    hidden: int
    vocabulary: int
    embedding: int
    item: int
    whole: int


@dataclass(frozen=True)
class Need:
    """What a run needs with these settings.

    Attributes:
        batch_size, in_memory: the settings.
        memory: peak bytes of this process.
        parts: where they come from.
        disk: bytes that the run writes at most at one time.
        operations: floating-point operations of all forward passes.
    """

    batch_size: int
    in_memory: bool
    memory: int
    parts: dict[str, int]
    disk: int
    operations: float


def sizes(model: Any, dtype: torch.dtype) -> Sizes:
    """Return what the estimate needs of a model, which may be on the meta device."""
    _, layers = find_layers(model)
    item = torch.empty((), dtype=dtype).element_size()
    per_layer = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    largest = layers[max(range(len(layers)), key=per_layer.__getitem__)]
    shapes = [tuple(one.weight.shape) for one in linears(largest).values()]
    text = model.config.get_text_config()
    return Sizes(
        len(layers),
        max(per_layer),
        max((rows * columns for rows, columns in shapes), default=0),
        max((columns for _, columns in shapes), default=0),
        max((max(shape) for shape in shapes), default=text.hidden_size),
        text.hidden_size,
        text.vocab_size,
        sum(p.numel() for p in model.parameters()) - sum(per_layer),
        item,
        sum(p.numel() for p in model.parameters()),
    )


def need(
    size: Sizes,
    options: TransformOptions,
    *,
    calibration: int,
    evaluation: int,
    dense: bool,
    statistics: int,
    whole: bool,
    batch_size: int,
    in_memory: bool,
    processes: int = 1,
    held: int = 0,
    tiles: int = 0,
    beside: int = 0,
) -> Need:
    """Return what a run needs, its memory in each process.

    Args:
        size: of the model.
        options: of the job.
        calibration, evaluation: tokens.
        dense: whether the hidden states of the unchanged model are kept for calibration, too.
        statistics: how many transforms look at activations.
        whole: whether a transform needs the whole model alive first.
        batch_size, in_memory: the settings to count with.
        processes: that share the texts.
        held: bytes of memory that the source of the weights takes.
        tiles: bytes of memory for the rows of experts that are merged at a time.
        beside: bytes that are stored beside the model.
    """
    streams = calibration * (2 if dense else 1) + evaluation * 2
    hidden = streams * size.hidden * size.item
    window = max(options.window if calibration else 0, options.evaluation_window if evaluation else 0)
    batch = batch_size * window
    # A layer's weights, three float32 copies of its largest linear while that is changed, and what it becomes.
    layer = size.layer * size.item * 2 + 3 * 4 * size.largest + tiles + beside // size.layers
    # Second moments in float64, of which a factorisation holds three.
    moments = 3 * 8 * size.inputs**2 if statistics else 0
    # Gate, up, their product and its input; hidden states in float32, as norms compute them.
    working = batch * (4 * size.widest * size.item + 6 * size.hidden * 4)
    head = size.embedding * size.item + window * size.vocabulary * 4 * 3 + tiles
    stages = {"layer": layer + moments + working, "embedding and head": head}
    if whole:
        stages["whole model, to learn end to end"] = (
            size.whole * size.item * 2 + batch * size.vocabulary * 4 * 3
        )
    stage = max(stages, key=stages.__getitem__)
    parts = {
        "process": int(PROCESS),
        "hidden states": int(
            hidden / processes * SLACK if in_memory else 2 * batch * size.hidden * size.item
        ),
        stage: int(stages[stage] * SLACK),
    }
    if held:
        parts["this process's part of the model"] = held
    passes = calibration * (1 + statistics + (1 if dense else 0)) + 2 * evaluation
    operations = 2.0 * (passes * size.layer * size.layers + 2 * evaluation * size.vocabulary * size.hidden)
    disk = size.whole * size.item + 2 * hidden + beside
    return Need(batch_size, in_memory, sum(parts.values()), parts, int(disk), operations)


def fitted(wanted: Need, options: TransformOptions, again: Any) -> Need:
    """Return the first way to run that fits the bound: as asked, then on disk, then in smaller batches.

    ``again(batch_size, in_memory)`` returns what that needs.

    Raises:
        UserError: none fits.
    """
    bound = options.memory_bytes
    if bound is None or wanted.memory <= bound:
        return wanted
    found = wanted
    if options.activations == "auto":
        found = again(found.batch_size, False)
    while found.memory > bound and found.batch_size > 1:
        found = again(max(1, found.batch_size // 2), found.in_memory)
    if found.memory > bound:
        largest = max(found.parts, key=found.parts.__getitem__)
        advice = (
            "transform.activations=disk would help"
            if found.in_memory
            else "a smaller transform.window may help"
        )
        raise UserError(
            f"transform.memory={options.memory} is too little: with batches of {found.batch_size} the run needs about "
            f"{_size(found.memory)}, most of it for '{largest}' ({_size(found.parts[largest])}); {advice}"
        )
    return replace(found)


def check_disk(needed: Need, folder: Path) -> None:
    """Refuse a disk that is too small, before anything is written.

    Raises:
        UserError: with what is free and what is needed.
    """
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed.disk:
        raise UserError(
            f"'{folder}' has {_size(free)} free and the run may need {_size(needed.disk)} (the checkpoint at full "
            f"size and hidden states); name another --output"
        )


def speed() -> float:
    """Return the floating-point operations per second of a matrix product on the device, measured for a moment."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    a = torch.randn(512, 512, device=device)
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * 512**3 / best


def words(needed: Need) -> str:
    """Return memory, disk and time in a sentence for the user."""
    seconds = needed.operations / speed()
    minutes = f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
    where = "in memory" if needed.in_memory else "on disk"
    return (
        f"about {_size(needed.memory)} of memory (hidden states {where}, batches of {needed.batch_size}), up to "
        f"{_size(needed.disk)} of disk, and {minutes} for the forward passes; what a method computes beside them "
        f"comes on top"
    )


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"
