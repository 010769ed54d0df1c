"""Triton kernels of :mod:`graftwork_kernels.second_moments`: products of the lower triangle's tiles, and their sum.

Shape suffixes: N tokens, D width, S parts of the tokens, P tiles of the lower triangle, E entries of a tile.
"""

# Launching a kernel takes what its signature does not have (num_warps), and constants as numbers.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from graftwork_kernels.tiles import dot

# Tokens that one accumulator in fp32 takes before its sum is added elsewhere.
MOST_TOKENS = 4096
_LEAST_TOKENS = 256
# Two for each multiprocessor of a large GPU; a narrow layer has few tiles, so its tokens are dealt out too.
_PROGRAMS = 264


@triton.jit
def _tile_of(pair):
    """Return row and column (row >= column) of the ``pair``-th tile of the lower triangle, counted by rows."""
    row = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    # A root in fp32 may be one off.
    row = tl.where(row * (row + 1) // 2 > pair, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= pair, row + 1, row)
    return row, pair - row * (row + 1) // 2


@triton.jit
def _products(
    x_ND, mask_N, part_SPE, tokens, width, pairs, share,
    MASKED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of x^T x over one part of the tokens. Tiles of one part are neighbours: x comes from the cache."""
    pid = tl.program_id(0)
    part, pair = pid // pairs, pid % pairs
    row, column = _tile_of(pair)
    left = row * BLOCK_D + tl.arange(0, BLOCK_D)
    right = column * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    end = tl.minimum((part + 1) * share, tokens)
    for start in range(part * share, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < end
        if MASKED:
            inside = inside & (tl.load(mask_N + n, mask=inside, other=0) != 0)
        base = n.to(tl.int64)[:, None] * width
        a = tl.load(x_ND + base + left[None, :], mask=inside[:, None] & (left < width)[None, :], other=0.0)
        b = tl.load(x_ND + base + right[None, :], mask=inside[:, None] & (right < width)[None, :], other=0.0)
        acc = dot(tl.trans(a), b, acc)
    e = tl.arange(0, BLOCK_D)
    place = pid.to(tl.int64) * (BLOCK_D * BLOCK_D) + e[:, None] * BLOCK_D + e[None, :]
    tl.store(part_SPE + place, acc)


@triton.jit
def _add(sum_DD, part_SPE, width, pairs, parts, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr):
    """Add the parts of BLOCK_R rows of a tile to the sum, in its dtype and in order, and mirror them."""
    pair = tl.program_id(0)
    row, column = _tile_of(pair)
    own = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    e = tl.arange(0, BLOCK_D)
    left, right = (row * BLOCK_D + own).to(tl.int64), (column * BLOCK_D + e).to(tl.int64)
    lower = (left < width)[:, None] & (right < width)[None, :] & (left[:, None] >= right[None, :])
    place = left[:, None] * width + right[None, :]
    total = tl.load(sum_DD + place, mask=lower, other=0.0)
    inside = own[:, None] * BLOCK_D + e[None, :]
    for part in range(parts):
        at = (part * pairs + pair).to(tl.int64) * (BLOCK_D * BLOCK_D)
        total += tl.load(part_SPE + at + inside).to(total.dtype)
    tl.store(sum_DD + place, total, mask=lower)
    tl.store(sum_DD + right[None, :] * width + left[:, None], total, mask=lower)


def add(sum_DD: torch.Tensor, x_ND: torch.Tensor, mask_N: torch.Tensor | None) -> None:
    """Add x^T x over the masked rows to the contiguous ``sum_DD``, in place.

    The order of every sum is fixed, so the result is the same bits every time on one device.
    """
    tokens, width = x_ND.shape
    if not x_ND.numel():
        return
    block_d = 64 if width <= 1024 or x_ND.dtype == torch.float32 else 128
    across = triton.cdiv(width, block_d)
    pairs = across * (across + 1) // 2
    wanted = triton.cdiv(_PROGRAMS, pairs)
    for start in range(0, tokens, MOST_TOKENS * wanted):
        x, mask = x_ND[start : start + MOST_TOKENS * wanted], None
        if mask_N is not None:
            mask = mask_N[start : start + MOST_TOKENS * wanted]
        share = min(MOST_TOKENS, max(_LEAST_TOKENS, triton.cdiv(len(x), wanted)))
        parts = triton.cdiv(len(x), share)
        part_SPE = torch.empty(parts, pairs, block_d * block_d, dtype=torch.float32, device=x.device)
        _products[(parts * pairs,)](
            x, x if mask is None else mask, part_SPE, len(x), width, pairs, share,
            MASKED=mask is not None, BLOCK_D=block_d, BLOCK_N=32 if x.dtype == torch.float32 else 64,
            num_warps=4 if block_d == 64 else 8,
        )  # fmt: skip
        _add[(pairs, block_d // 16)](sum_DD, part_SPE, width, pairs, parts, BLOCK_D=block_d, BLOCK_R=16)
