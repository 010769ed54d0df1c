"""Triton kernel of :mod:`graftwork_kernels.ties_merge`: one pass, every entry is read once.

Both sides of 0 are summed while the sign is not known yet. Memory-bound: N + 1 entries move per entry of the result.
"""

# Arguments and options of kernels are Triton's own language.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_BLOCK = 512
_UNROLLED = 16  # Loops over so many vectors are unrolled: their loads do not wait for sums.


@triton.jit
def _entry(deltas, bounds, index, place, inside, entries, count, TRIM: tl.constexpr, EXACT: tl.constexpr):
    """Return the kept entries of one vector, in float64."""
    found = tl.load(deltas + index.to(tl.int64) * entries + place, mask=inside, other=0.0).to(EXACT)
    if TRIM:
        limit = tl.load(bounds + index).to(EXACT)
        end = tl.load(bounds + count + index).to(tl.int64)
        size = tl.abs(found)
        found = tl.where((size > limit) | ((size == limit) & (place < end)), found, 0.0)
    return found.to(tl.float64)


@triton.jit
def _add(value, total, above, below, number, MAX: tl.constexpr):
    positive = tl.where(value > 0, value, 0.0)
    negative = tl.where(value < 0, value, 0.0)
    total += value
    if MAX:
        above = tl.maximum(above, positive)
        below = tl.minimum(below, negative)
    else:
        above += positive
        below += negative
        # Two counters in one: those above 0 in the lower half, those below in the upper.
        number += tl.where(value > 0, 1, 0) + tl.where(value < 0, 65536, 0)
    return total, above, below, number


@triton.jit
def _merge_kernel(
    deltas, bounds, out, entries, count,
    COUNT: tl.constexpr, TRIM: tl.constexpr, EXACT: tl.constexpr, MAX: tl.constexpr, MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < entries
    total = tl.zeros([BLOCK], tl.float64)
    above = tl.zeros([BLOCK], tl.float64)
    below = tl.zeros([BLOCK], tl.float64)
    number = tl.zeros([BLOCK], tl.int32)
    if COUNT:
        for one in tl.static_range(COUNT):
            value = _entry(
                deltas, bounds, tl.full([], one, tl.int32), place, inside, entries, count, TRIM, EXACT
            )
            total, above, below, number = _add(value, total, above, below, number, MAX)
    else:
        for one in range(count):
            value = _entry(
                deltas, bounds, tl.zeros([], tl.int32) + one, place, inside, entries, count, TRIM, EXACT
            )
            total, above, below, number = _add(value, total, above, below, number, MAX)
    found = tl.where(total > 0, above, tl.where(total < 0, below, 0.0))
    if MEAN:
        chosen = tl.where(total > 0, number & 65535, number >> 16)
        found = found / tl.maximum(chosen, 1).to(tl.float64)
    tl.store(out + place, found.to(EXACT).to(out.dtype.element_ty), mask=inside)


def merge(flat_NP: torch.Tensor, thresholds: Sequence[float], ends: Sequence[int], how: str) -> torch.Tensor:
    """Merge contiguous vectors, at least one entry each.

    Raises:
        ValueError: more vectors than the counters hold.
    """
    count, entries = flat_NP.shape
    if count > 32767:
        raise ValueError(f"{count} vectors are too many; 32767 are merged at once at most")
    out = flat_NP.new_empty(entries)
    # Both in one tensor and so in one copy; float64 holds every float32 and every place.
    limits = list(ends) or [entries] * count
    bounds = (
        torch.tensor([list(thresholds), limits], dtype=torch.float64, device=flat_NP.device)
        if thresholds
        else out
    )
    _merge_kernel[(triton.cdiv(entries, _BLOCK),)](
        flat_NP, bounds, out, entries, count,
        COUNT=count if count <= _UNROLLED else 0, TRIM=bool(thresholds),
        EXACT=tl.float64 if flat_NP.dtype == torch.float64 else tl.float32,
        MAX=how == "max", MEAN=how == "mean", BLOCK=_BLOCK,
    )  # fmt: skip
    return out
