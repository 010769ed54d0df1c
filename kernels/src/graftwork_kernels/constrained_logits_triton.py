"""The Triton kernels of :mod:`graftwork_kernels.constrained_logits`; Triton must be there.

A row is cut into parts, so that a batch of one fills a GPU too. The first kernel reads each part once and writes what a
row is decided by; the second puts a row's parts together, in every program anew since they are few, and writes the
scores. Both keep a value per lane and add up over lanes at the end.

Shapes: B rows, V words, S parts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK, PART = 1024, 8192
# Of a part: maximum, second, least, sum, moment of the main row, and of the contrast row.
NUMBERS = 10
FLOOR = tl.constexpr(-1000.0)


@triton.jit
def _take_in(z, top, second, least, total, moment):
    """Update the running numbers of every lane with a logit each."""
    now = tl.maximum(top, z)
    second = tl.maximum(second, tl.minimum(top, z))
    least = tl.minimum(least, tl.where(z == -float("inf"), float("inf"), z))
    origin = tl.where(now == -float("inf"), 0.0, now)
    step = tl.minimum(tl.maximum(top - origin, FLOOR), 0.0)
    factor = tl.exp(step)
    shifted = z - origin
    raised = tl.exp(shifted)
    moment = factor * (moment + step * total) + raised * tl.where(raised == 0, 0.0, shifted)
    return now, second, least, factor * total + raised, moment


@triton.jit
def _put_together(top, second, least, total, moment, lanes):
    """Return the numbers of all lanes as one."""
    largest = tl.max(top, 0)
    first = tl.argmax(top, 0)
    others = tl.where(lanes == first, -float("inf"), top)
    runner_up = tl.maximum(tl.max(others, 0), tl.max(second, 0))
    origin = tl.where(largest == -float("inf"), 0.0, largest)
    step = tl.minimum(tl.maximum(top - origin, FLOOR), 0.0)
    factor = tl.exp(step)
    moment = tl.sum(factor * (moment + step * total), 0)
    return largest, runner_up, tl.min(least, 0), tl.sum(factor * total, 0), moment


@triton.jit
def _read_kernel(
    main, contrast, parts, size, vocabulary, splits,
    stride_mb, stride_mv, stride_cb, stride_cv,
    PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    nothing = tl.zeros((BLOCK,), tl.float32)
    low = nothing - float("inf")
    top2, second2, least2, total2, moment2 = low, low, -low, nothing, nothing
    top1, second1, least1, total1, moment1 = low, low, -low, nothing, nothing
    for start in range(split * PART, tl.minimum(split * PART + PART, vocabulary), BLOCK):
        words = (start + lanes).to(tl.int64)
        there = words < vocabulary
        z2 = tl.load(main + row * stride_mb + words * stride_mv, mask=there, other=-float("inf"))
        z1 = tl.load(contrast + row * stride_cb + words * stride_cv, mask=there, other=-float("inf"))
        top2, second2, least2, total2, moment2 = _take_in(
            z2.to(tl.float32), top2, second2, least2, total2, moment2
        )
        top1, second1, least1, total1, moment1 = _take_in(
            z1.to(tl.float32), top1, second1, least1, total1, moment1
        )
    top2, second2, least2, total2, moment2 = _put_together(top2, second2, least2, total2, moment2, lanes)
    top1, second1, least1, total1, moment1 = _put_together(top1, second1, least1, total1, moment1, lanes)
    target = parts + row * splits + split
    tl.store(target, top2)
    tl.store(target + size, second2)
    tl.store(target + 2 * size, least2)
    tl.store(target + 3 * size, total2)
    tl.store(target + 4 * size, moment2)
    tl.store(target + 5 * size, top1)
    tl.store(target + 6 * size, second1)
    tl.store(target + 7 * size, least1)
    tl.store(target + 8 * size, total1)
    tl.store(target + 9 * size, moment1)


@triton.jit
def _whole_row(source, size, lanes, there):
    """Return the five numbers of a row from those of its parts."""
    low = -float("inf")
    return _put_together(
        tl.load(source, mask=there, other=low),
        tl.load(source + size, mask=there, other=low),
        tl.load(source + 2 * size, mask=there, other=float("inf")),
        tl.load(source + 3 * size, mask=there, other=0.0),
        tl.load(source + 4 * size, mask=there, other=0.0),
        lanes,
    )


@triton.jit
def _write_kernel(
    main, contrast, parts, scores, found, rows, size, vocabulary, splits, inside, outside, margin,
    stride_mb, stride_mv, stride_cb, stride_cv,
    BANDED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SPLITS)
    source = parts + row * splits + lanes
    top2, second2, least2, total2, _ = _whole_row(source, size, lanes, lanes < splits)
    top1, _, least1, total1, moment1 = _whole_row(source + 5 * size, size, lanes, lanes < splits)
    normaliser2 = top2 + tl.log(total2)
    normaliser1 = top1 + tl.log(total1)
    entropy = tl.log(total1) - moment1 / total1  # pyright: ignore[reportOperatorIssue]
    if BANDED:
        above = normaliser2 - entropy + margin
        below = normaliser2 - entropy - margin
    else:
        above = top2 - margin
        above = tl.where((second2 > above) | (top2 <= above), above, float("inf"))
        below = least2 + margin
    if tl.program_id(1) == 0:
        tl.store(found + row, normaliser2)
        tl.store(found + rows + row, normaliser1)
        tl.store(found + 2 * rows + row, entropy)
        tl.store(found + 3 * rows + row, above)
        tl.store(found + 4 * rows + row, below)
    words = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    there = words < vocabulary
    low = -float("inf")
    z2 = tl.load(main + row * stride_mb + words * stride_mv, mask=there, other=low).to(tl.float32)
    z1 = tl.load(contrast + row * stride_cb + words * stride_cv, mask=there, other=low).to(tl.float32)
    violates = (z2 >= above) | (z2 <= below) if BANDED else (z2 > above) | (z2 < below)
    tau = tl.where(violates, inside, outside)
    gain = (z2 - normaliser2) - (tl.where(z1 == low, least1, z1) - normaliser1)
    score = tl.where(tau == 0, z2, z2 + tau * gain)
    score = tl.where((z2 == low) | ((z1 == low) & (tau < 0)), low, score)
    target = scores + row * vocabulary + words
    tl.store(target, score.to(scores.dtype.element_ty), mask=there)


def constrained(
    main_BV: torch.Tensor,
    contrast_BV: torch.Tensor,
    alpha: float,
    margin: float,
    banded: bool,
    swapped: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores (B x V), and normalisers, entropy and bounds (5 x B in float32)."""
    rows, vocabulary = main_BV.shape
    scores = torch.empty((rows, vocabulary), dtype=main_BV.dtype, device=main_BV.device)
    found = torch.empty((5, rows), dtype=torch.float32, device=main_BV.device)
    if not rows:
        return scores, found
    splits = math.ceil(vocabulary / PART)
    parts = torch.empty((NUMBERS, rows, splits), dtype=torch.float32, device=main_BV.device)
    strides = *main_BV.stride(), *contrast_BV.stride()
    read: Any = _read_kernel[(rows, splits)]
    read(
        main_BV, contrast_BV, parts, rows * splits, vocabulary, splits, *strides,
        PART=PART, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    inside, outside = (alpha - 1.0, alpha) if swapped else (alpha, alpha - 1.0)
    write: Any = _write_kernel[(rows, math.ceil(vocabulary / BLOCK))]
    write(
        main_BV, contrast_BV, parts, scores, found, rows, rows * splits, vocabulary, splits, inside, outside, margin,
        *strides, BANDED=banded, SPLITS=triton.next_power_of_2(splits), BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip
    return scores, found
