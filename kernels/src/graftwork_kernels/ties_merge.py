"""TIES over N vectors at once: trim by given thresholds, elect a sign, merge what has it.

Legend: N vectors of P entries each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from graftwork_kernels.dispatch import fused
from graftwork_kernels.masked_delta import CHUNK, FLOATS, INTEGERS, spread

How = Literal["mean", "sum", "max"]
HOWS: tuple[How, ...] = ("mean", "sum", "max")


def ties_merge_reference(
    deltas: torch.Tensor,
    thresholds: Sequence[float] | None = None,
    ends: Sequence[int] | None = None,
    how: How = "mean",
) -> torch.Tensor:
    """Merge step by step in float64; the definition. See :func:`ties_merge`."""
    flat_NP = deltas.detach().flatten(1).double()
    place_P = torch.arange(flat_NP.shape[1], device=deltas.device)
    kept_NP = flat_NP.clone()
    for index, value in enumerate(thresholds or ()):
        size_P = flat_NP[index].abs()
        tie_P = size_P == value
        if ends is not None:
            tie_P &= place_P < ends[index]
        kept_NP[index] = torch.where((size_P > value) | tie_P, flat_NP[index], 0.0)
    total_P = torch.zeros_like(place_P, dtype=torch.float64)
    for kept_P in kept_NP:
        total_P = total_P + kept_P
    agrees_NP = (kept_NP.sign() == total_P.sign()) & (kept_NP != 0)
    chosen_NP = torch.where(agrees_NP, kept_NP, 0.0)
    if how == "max":
        found_P = chosen_NP.abs().amax(0) * total_P.sign()
    else:
        found_P = torch.zeros_like(total_P)
        for chosen_P in chosen_NP:
            found_P = found_P + chosen_P
        if how == "mean":
            found_P = found_P / agrees_NP.sum(0).clamp_min(1)
    return found_P.view(deltas.shape[1:]).to(deltas.dtype)


def ties_merge(
    deltas: torch.Tensor,
    thresholds: Sequence[float] | None = None,
    ends: Sequence[int] | None = None,
    how: How = "mean",
) -> torch.Tensor:
    """Return the TIES merge of N vectors (shape of one of them, dtype of ``deltas``). No gradient.

    With ``t_i = tau_i [ |tau_i| > q_i, or |tau_i| = q_i in an entry before ends_i ]`` and ``s = sign(sum_i t_i)``:
    mean, sum or largest (by size) of those ``t_i`` that have the sign ``s``; 0 where the sum is exactly 0. Sums are
    taken in float64 one vector after the other, whatever the dtype, and the result is rounded once: it is the same
    bit for bit on every path and for parts of any size. TIES-Merging, Yadav et al., NeurIPS 2023; the rule for ties
    (the first entries of those of the threshold's size, so that exactly as many are kept as are asked for) is ours.

    Args:
        deltas: N x any shape, float32, bfloat16, float16 or float64; N at least 1.
        thresholds: ``q_i``, N numbers of float32 (of float64 where ``deltas`` are); without them all is kept.
        ends: how many entries, from the first, are kept if as large as the threshold; without them all are.
        how: mean, sum or max.

    Raises:
        ValueError: no vector, a dtype that is no float, another number of thresholds or ends, ends without
            thresholds, or an unknown ``how``.
    """
    if deltas.ndim < 2 or deltas.shape[0] < 1 or deltas.dtype not in FLOATS:
        raise ValueError(
            f"vectors to merge are N x entries of a float dtype, not {tuple(deltas.shape)} of {deltas.dtype}"
        )
    if how not in HOWS:
        raise ValueError(f"merge by {', '.join(HOWS)}, not by '{how}'")
    if ends is not None and thresholds is None:
        raise ValueError("ends say what is kept at a threshold, and there are no thresholds")
    count = deltas.shape[0]
    for name, given in (("thresholds", thresholds), ("ends", ends)):
        if given is not None and len(given) != count:
            raise ValueError(f"there are {count} vectors and {len(given)} {name}; give one for each")
    given = (deltas.detach(), list(thresholds or ()), list(ends or ()), how)
    # Where nothing is traced, calling an op takes longer than a small merge.
    return _merge(*given) if torch.compiler.is_compiling() or fused(deltas) else _by_parts(*given)


@torch.library.custom_op("graftwork::ties_merge", mutates_args=())
def _merge(deltas: torch.Tensor, thresholds: Sequence[float], ends: Sequence[int], how: str) -> torch.Tensor:
    if not fused(deltas):
        return _by_parts(deltas, thresholds, ends, how)
    if not deltas.numel():
        return deltas.new_empty(deltas.shape[1:])
    from graftwork_kernels.ties_merge_triton import merge

    return merge(deltas.flatten(1).contiguous(), thresholds, ends, how).view(deltas.shape[1:])


@_merge.register_fake
def _(deltas: torch.Tensor, thresholds: Sequence[float], ends: Sequence[int], how: str) -> torch.Tensor:
    return deltas.new_empty(deltas.shape[1:])


def _by_parts(
    deltas: torch.Tensor, thresholds: Sequence[float], ends: Sequence[int], how: str
) -> torch.Tensor:
    """Merge a part at a time, so that what is computed on the way stays in a cache."""
    flat_NP = deltas.flatten(1)
    parts = [
        _plain(flat_NP[:, at : at + CHUNK], thresholds, [end - at for end in ends], how)
        for at in range(0, max(1, flat_NP.shape[1]), CHUNK)
    ]
    return torch.cat(parts).view(deltas.shape[1:])


def _plain(flat_NP: torch.Tensor, thresholds: Sequence[float], ends: Sequence[int], how: str) -> torch.Tensor:
    """Merge vector by vector, in as few passes as PyTorch allows."""
    kept = list(flat_NP)
    if thresholds:
        limits = ends or [flat_NP.shape[1]] * len(kept)
        kept = [_trimmed(*one) for one in zip(kept, thresholds, limits, strict=True)]
    total_P = torch.zeros(flat_NP.shape[1], dtype=torch.float64, device=flat_NP.device)
    for kept_P in kept:
        total_P += kept_P
    sign_P = total_P.sign().to(flat_NP.dtype)
    # Times the sign, what agrees is positive; sums round alike on both sides of 0.
    if how == "max":
        found_P = torch.zeros_like(sign_P)
        for kept_P in kept:
            torch.maximum(found_P, kept_P * sign_P, out=found_P)
        # Zeros may have become negative ones.
        return (found_P * sign_P).add_(0.0)
    found_P = total_P.zero_()
    number_P = torch.zeros_like(found_P)
    for kept_P in kept:
        agreeing_P = (kept_P * sign_P).clamp_min_(0)
        found_P += agreeing_P
        if how == "mean":
            number_P += agreeing_P.sign_()
    if how == "mean":
        found_P /= number_P.clamp_min_(1)
    return found_P.to(flat_NP.dtype) * sign_P


def _trimmed(delta_P: torch.Tensor, threshold: float, end: int) -> torch.Tensor:
    size_P = delta_P.abs()
    if size_P.dtype in (torch.bfloat16, torch.float16):
        # A threshold need not be a number of theirs.
        size_P = size_P.float()
    if end >= len(size_P):
        kept_P = size_P >= threshold
    else:
        kept_P = size_P > threshold
        if end > 0:
            kept_P[:end] |= size_P[:end] == threshold
    bits_P = spread(kept_P, INTEGERS[delta_P.dtype.itemsize])
    return bits_P.bitwise_and_(delta_P.view(bits_P.dtype)).view(delta_P.dtype)
