"""How the updates of the tasks of a stream point: cosines between them, from small linear sketches.

The update of a task is the change of the effective weights, base plus active adapters, of every adapted linear
layer (of every matrix where all weights train). To keep them all would take the memory of one model per task.
Each is kept as a two-sided count sketch instead: rows and columns get random signs and are summed in ``SIDE``
buckets each, S1 dW S2^T (ours, after Charikar, Chen and Farach-Colton, "Finding frequent items in data
streams", 2002). The sketch is linear, so that of an update is a difference of two sketches, and inner products
of sketches are those of the matrices in the mean over signs and buckets.

The buckets are equally full (a random permutation, dealt out), which sums in a fixed order on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

SIDE = 64
"""Buckets for rows and for columns; a layer's sketch takes 16 KiB."""

FILE = "interference.safetensors"
_MULTIPLIES = ("OFT", "BOFT", "HRA", "MISS")
"""PEFT methods whose ``get_delta_weight`` returns a factor of the base weight, not what is added to it."""

Sketches = dict[str, torch.Tensor]


class _NotMeasured(Exception):
    """Why this model's updates cannot be read off its weights."""


def fold(matrix: torch.Tensor, name: str, side: int = SIDE) -> torch.Tensor:
    """Return the sketch (at most side x side, fp32, on the CPU) of a matrix (m x n) of the layer ``name``.

    Signs and buckets follow from the name and the shape. A dimension of at most ``side`` stays as it is.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    rows = _fold_rows(matrix.float(), generator, side)
    # A copy: what is small enough to stay as it is must not change with the weights.
    return _fold_rows(rows.T, generator, side).T.cpu().clone(memory_format=torch.contiguous_format)


def _fold_rows(matrix: torch.Tensor, generator: torch.Generator, side: int) -> torch.Tensor:
    count = len(matrix)
    if count <= side:
        return matrix
    order = torch.randperm(count, generator=generator)
    signs = 2 * torch.randint(2, (count, 1), generator=generator, dtype=matrix.dtype) - 1
    dealt = matrix[order.to(matrix.device)].mul_(signs.to(matrix.device))
    whole = count // side * side
    folded = dealt[:whole].view(-1, side, matrix.shape[1]).sum(0)
    folded[: count - whole] += dealt[whole:]
    return folded


def variance(sketch: torch.Tensor, side: int = SIDE) -> float:
    """Return a bound on Var <S(A), S(B)> / (|A|^2 |B|^2), from the shape of the sketches.

    Folding rows into p buckets gives at most (2/p) |A B^T|^2 <= (2/p) |A|^2 |B|^2, folding both sides
    (1 + 2/p)^2 - 1. It is reached where A and B have rank one and share their directions, and is far from it
    for matrices of high rank.
    """
    return (1 + 2 / side) ** sum(size >= side for size in sketch.shape) - 1


def snapshot(model: nn.Module) -> Sketches:
    """Return the sketch of every effective weight of ``model`` by its name, one layer in memory at a time.

    Raises:
        _NotMeasured: the weights are sharded, or the adapters add no fixed matrix to the base weights.
    """
    with torch.no_grad():
        return {name: fold(weight, name) for name, weight in _effective(model)}


def _effective(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
    if isinstance(model, PeftModel):
        for name in model.active_adapters:
            kind = str(getattr(model.peft_config[name].peft_type, "value", model.peft_config[name].peft_type))
            if kind in _MULTIPLIES or not layers:
                raise _NotMeasured(f"adapters of the type {kind} do not add to the weights of layers")
    for name, layer in layers:
        # A router, say, is a part of an adapter and wraps no layer.
        if hasattr(layer, "base_layer"):
            yield name, _matrix(_adapted(name, layer))
    if not layers:
        for name, parameter in model.named_parameters():
            _refuse_shards(parameter)
            if parameter.ndim > 1 and parameter.is_floating_point():
                yield name, _matrix(parameter)


def _adapted(name: str, layer: BaseTunerLayer) -> torch.Tensor:
    """Return base weight plus deltas of one layer (deltas alone where the base is packed)."""
    base = getattr(layer.get_base_layer(), "weight", None)
    if base is not None:
        _refuse_shards(base)
    if base is None or not hasattr(layer, "get_delta_weight"):
        raise _NotMeasured(
            f"layer '{name}' ({type(layer).__name__}) does not tell what it adds to its weight"
        )
    # Packed weights of a quantised model do not change; what is added to them is all of the update.
    total = base.detach().float() if base.is_floating_point() else None
    for adapter in layer.active_adapters:
        if adapter in getattr(layer, "lora_variant", {}):
            raise _NotMeasured(f"layer '{name}' does not only add to its weight (a variant such as DoRA)")
        if adapter in layer.merged_adapters or not _holds(layer, adapter):
            continue
        try:
            delta = cast(Any, layer).get_delta_weight(adapter).detach()
        except Exception as error:
            raise _NotMeasured(
                f"layer '{name}' has no fixed update ({' '.join(str(error).split())})"
            ) from error
        if total is not None and delta.shape != total.shape:
            delta = delta.T
        total = delta.float() if total is None else total + delta.float()
    return torch.zeros(1, 1) if total is None else total


def _holds(layer: BaseTunerLayer, adapter: str) -> bool:
    """Return whether ``adapter`` was injected into this layer: adapters may target different layers."""
    names = [*layer.adapter_layer_names, *layer.other_param_names]
    by_adapter = [held for held in (getattr(layer, name, None) for name in names) if hasattr(held, "keys")]
    return any(adapter in cast(Any, held) for held in by_adapter)


def _refuse_shards(weight: torch.Tensor) -> None:
    if weight.numel() == 0 or hasattr(weight, "ds_id") or hasattr(weight, "full_tensor"):
        raise _NotMeasured("the weights are spread over several processes")


def _matrix(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as a matrix: kernels of convolutions by output channel, stacked matrices one below another."""
    return weight.detach().flatten(1) if weight.ndim > 3 else weight.detach().reshape(-1, weight.shape[-1])


class Updates:
    """The sketched update of the task in progress, and why there is none."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.reason = ""
        self._start: Sketches = {}
        self._update: Sketches = {}

    def begin(self, model: nn.Module) -> None:
        """Remember the weights that a task starts from; needs no state, since a resumed task starts from the same."""
        self._start = self._snapshot(model)

    def end(self, model: nn.Module) -> None:
        """Take the difference to the task's start."""
        now = self._snapshot(model)
        differences = {name: now[name] - start for name, start in self._start.items() if name in now}
        self._update = {name: change for name, change in differences.items() if change.any()}
        self._start = {}

    def save(self, folder: Path) -> None:
        """Write the update into the stage's folder, where there is one."""
        if self._update:
            save_file(self._update, folder / FILE)

    def result(self, stages: Sequence[Path]) -> dict[str, Any]:
        """Return ``interference`` (see :func:`cosines`; empty where nothing was measured) and its error."""
        if not self.wanted or self.reason:
            return {"interference": [], "interference_error": None}
        paths = [stage / FILE for stage in stages]
        matrix, error = cosines([load_file(path) if path.exists() else {} for path in paths])
        return {"interference": matrix, "interference_error": error}

    def notes(self) -> list[str]:
        """Return why there is no figure, as a sentence; nothing where there is one or none was wanted."""
        return (
            [f"the cosines between the updates of tasks are not known: {self.reason}"] if self.reason else []
        )

    def _snapshot(self, model: nn.Module) -> Sketches:
        if not self.wanted or self.reason:
            return {}
        try:
            return snapshot(model)
        except _NotMeasured as error:
            self.reason = str(error)
            return {}


def cosines(updates: Sequence[Sketches]) -> tuple[list[list[float | None]], float | None]:
    """Return the cosine of every two updates (T x T) over all layers together, and its largest standard error.

    None stands where a task changed nothing. The error is a bound: with the shares a_l, b_l of the layers in
    the squared norms of two updates, sqrt(sum of v_l a_l b_l), v_l from :func:`variance`.
    """
    norms = [{name: float(s.double().square().sum()) for name, s in update.items()} for update in updates]
    totals = [sum(squares.values()) for squares in norms]
    matrix: list[list[float | None]] = [[None] * len(updates) for _ in updates]
    worst: float | None = None
    for i, first in enumerate(updates):
        for j, second in enumerate(updates[: i + 1]):
            if not (totals[i] > 0 and totals[j] > 0):
                continue
            common = [name for name in first if name in second and first[name].shape == second[name].shape]
            product = sum(float((first[n].double() * second[n].double()).sum()) for n in common)
            value = max(-1.0, min(1.0, product / (totals[i] * totals[j]) ** 0.5))
            matrix[i][j] = matrix[j][i] = 1.0 if i == j else value
            if i != j:
                shared = sum(variance(first[n]) * norms[i][n] * norms[j][n] for n in common)
                worst = max(worst or 0.0, (shared / (totals[i] * totals[j])) ** 0.5)
    return matrix, worst
