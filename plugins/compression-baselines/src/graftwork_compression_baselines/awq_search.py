"""The two searches of AWQ: scales of input channels by the parent module's output, and clipped ranges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from graftwork.transform.quantizer import fake_quantize_weight
from graftwork.transform.scheme import WeightScheme
from graftwork.transform.structure import first_tensor

if TYPE_CHECKING:
    from graftwork.transform.block import Block

RATIOS = 20
"""Exponents tried: 0, 1/20, ... 19/20 (the paper's code)."""
CLIP_STEPS, CLIP_GRID = 10, 20
"""Shares of the range tried: 1, 19/20, ... 11/20 (the paper's code)."""


class _Enough(Exception):
    """Ends a forward pass when the input was seen."""


def channel_weights(weights: Sequence[torch.Tensor], group: int | None) -> torch.Tensor:
    """Return the mean over rows of ``|W_ij| / max of its group`` (d, float64) for weights that read one input."""
    stacked = torch.cat([weight.detach().double() for weight in weights]).abs()
    grouped = stacked.unflatten(1, (-1, group or stacked.shape[1]))
    return (grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).flatten(1).mean(0)


def candidate(inputs: torch.Tensor, weights: torch.Tensor | None, ratio: float) -> torch.Tensor:
    """Return scales (d) for one exponent, normalised so that the largest times the least is one.

    ``inputs^ratio``, and, given ``weights``, divided by ``weights^(1 - ratio) + 1e-4``.
    """
    scales = inputs.double().pow(ratio)
    if weights is not None:
        scales = scales / (weights.double().pow(1 - ratio) + 1e-4)
    scales = scales.clamp(min=1e-4)
    return scales / (scales.max() * scales.min()).sqrt()


def rounded_under(weight: torch.Tensor, scales: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """Return ``Q(W s) / s`` (out x in): what acts on inputs that are not scaled."""
    scaled = (weight.double() * scales).to(weight.dtype)
    return (fake_quantize_weight(scaled, scheme).double() / scales).to(weight.dtype)


def losses_by_output(
    block: Block,
    parent: str,
    weights: Mapping[str, torch.nn.Parameter],
    scales: Sequence[torch.Tensor],
    scheme: WeightScheme,
    batches: int | None,
) -> list[float]:
    """Return for every candidate the mean squared error of the output of the module ``parent``.

    Args:
        block: the layer.
        parent: a module within the layer that contains the linears.
        weights: their weights, which are as before when this returns.
        scales: candidates (d each).
        scheme: of the rounding.
        batches: of calibration windows to look at; None for all.
    """
    module = block.get(parent)
    # The last number counts the values.
    sums = torch.zeros(len(scales) + 1, dtype=torch.float64)
    originals = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for number, (arguments, named) in enumerate(parent_inputs(block, parent)):
            if number == batches:
                break
            with torch.no_grad():
                reference = first_tensor(module(*arguments, **named)).float()
                for place, one in enumerate(scales):
                    for name, weight in weights.items():
                        weight.data.copy_(rounded_under(originals[name], one, scheme))
                    output = first_tensor(module(*arguments, **named)).float()
                    sums[place] += (output - reference).square().sum(dtype=torch.float64).cpu()
                    for name, weight in weights.items():
                        weight.data.copy_(originals[name])
            sums[-1] += reference.numel()
    finally:
        for name, weight in weights.items():
            weight.data.copy_(originals[name])
    sums = block.reduced(sums.to(next(iter(originals.values())).device), torch.add)
    return (sums[:-1] / sums[-1]).tolist()


def losses_by_moments(
    weight: torch.Tensor, moments: torch.Tensor, scales: Sequence[torch.Tensor], scheme: WeightScheme
) -> list[float]:
    """Return the same where the linear is the parent itself: ``tr(D H D^T)``, summed over tokens, ``H = sum x x^T``."""
    found = []
    for one in scales:
        wrong = weight.detach().double() - rounded_under(weight.detach(), one, scheme).double()
        found.append(float(((wrong @ moments.double()) * wrong).sum()))
    return found


def parent_inputs(block: Block, parent: str) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield what the module ``parent`` is called with, batch by batch."""
    for hidden, kwargs in block.batches(share=True):
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def see(module: Any, arguments: Any, named: Any, calls: Any = calls) -> None:
            calls.append((arguments, named))
            raise _Enough

        handle = block.get(parent).register_forward_pre_hook(see, with_kwargs=True)
        try:
            with torch.no_grad():
                block.run(hidden, kwargs)
        except _Enough:
            pass
        finally:
            handle.remove()
        yield calls[0]


def clipped(
    weight: torch.Tensor, moments: torch.Tensor, scheme: WeightScheme, rows: int = 256
) -> torch.Tensor:
    """Return the weight (out x in) clamped, group by group, to the share of its largest value that rounds best.

    A group's share ``1 - i/20``, ``i`` from 0 to 9, is the one whose rounded values give the group's part of the output
    with the least squared error over all tokens: ``d H_g d^T``, ``H_g`` the group's block of ``sum x x^T``.
    """
    size = scheme.group or weight.shape[1]
    count = weight.shape[1] // size
    kept = [slice(start, start + size) for start in range(0, weight.shape[1], size)]
    blocks = torch.stack([moments[part, part] for part in kept]).float()
    result = torch.empty_like(weight)
    for first in range(0, len(weight), rows):
        part = weight[first : first + rows].detach()
        grouped = part.unflatten(1, (count, size))
        most = grouped.abs().amax(-1, keepdim=True)
        best = torch.full((len(part), count), torch.inf, device=weight.device)
        chosen = grouped
        for step in range(CLIP_STEPS):
            limit = most * (1 - step / CLIP_GRID)
            tried = grouped.clamp(-limit, limit)
            wrong = (
                (fake_quantize_weight(tried.flatten(1), scheme) - part).float().unflatten(1, (count, size))
            )
            error = (torch.einsum("ogi,gij->ogj", wrong, blocks) * wrong).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            chosen = torch.where(better.unsqueeze(-1), tried, chosen)
        result[first : first + rows] = chosen.flatten(1)
    return result
