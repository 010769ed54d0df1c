"""What is measured of a layer before and after it is changed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from graftwork.transform.modules import CompressedLinear


def flatness(values: torch.Tensor) -> float:
    """Return how unevenly the energy of a tensor is spread: 0 where all entries are equally large, 1 for one entry.

    With ``p = x^2 / sum x^2`` and ``N`` entries it is ``1 - H(p) / ln N``, H being the entropy.
    """
    if values.numel() < 2:
        return 0.0
    energy = values.detach().float().square().flatten().double()
    total = energy.sum()
    if total == 0:
        return 0.0
    p = energy / total
    entropy = -torch.special.xlogy(p, p).sum().item()
    return max(0.0, 1 - entropy / math.log(p.numel()))


def relative_error(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Return ``||reference - found||^2 / ||reference||^2`` in float64 sums."""
    difference = (reference.float() - found.float()).square().sum(dtype=torch.float64)
    return float(difference / reference.float().square().sum(dtype=torch.float64).clamp_min(1e-30))


def weights_flatness(layer: nn.Module) -> float:
    """Return the mean flatness of the weights of a layer's linears, as they are multiplied with."""
    values = []
    for module in layer.modules():
        if isinstance(module, CompressedLinear):
            values.append(flatness(module.dense_weight()))
        elif isinstance(module, nn.Linear):
            values.append(flatness(module.weight))
    return mean(values)


@contextlib.contextmanager
def watching(layer: nn.Module) -> Iterator[dict[str, float]]:
    """Yield a mapping that gets the flatness of what each linear reads at its first call, rotated where it is."""
    seen: dict[str, float] = {}

    def see(name: str) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Any, ...]) -> None:
            if name not in seen:
                rotation = getattr(module, "rotation", None)
                seen[name] = flatness(arguments[0] if rotation is None else rotation(arguments[0]))

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear | CompressedLinear):
                stack.callback(module.register_forward_pre_hook(see(name)).remove)
        yield seen


def mean(values: Iterable[float]) -> float:
    """Return the mean; NaN where there is nothing."""
    known = list(values)
    return math.fsum(known) / len(known) if known else math.nan
