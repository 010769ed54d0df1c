"""What is measured of a layer before and after it is changed."""

from __future__ import annotations

import math
from collections.abc import Mapping

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
    return _mean(values)


def inputs_flatness(inputs: Mapping[str, torch.Tensor]) -> float:
    """Return the mean flatness of the inputs (tokens x inputs) of a layer's linears."""
    return _mean([flatness(x) for x in inputs.values()])


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
