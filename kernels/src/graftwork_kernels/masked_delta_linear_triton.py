"""Triton kernel of :mod:`graftwork_kernels.masked_delta_linear`: tokens sorted by route, blocks of one route each.

A program multiplies a block of tokens by a tile of weights at a time, which it forms in registers from base, difference
and bits, so weights cost 4 + 1/8 bytes an entry in bfloat16 and no memory. Which block has which route is found on the
device, so nothing waits. Block sizes are chosen by the number of tokens and the dtype, not tuned at run time.
"""

# Arguments and options of kernels are Triton's own language.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from graftwork_kernels.dispatch import INTERPRETED

_WIDE = 64  # Columns of a tile: two words of each row.


@triton.jit
def _weights(
    weight, delta, words, scale, row, column, outputs, inputs, row_words, masked, WIDE: tl.constexpr
):
    """Return a tile of the weights of one route, in their dtype; ``column`` is a multiple of 64."""
    columns = column + tl.arange(0, WIDE)
    inside = (row < outputs)[:, None] & (columns < inputs)[None, :]
    place = row.to(tl.int64)[:, None] * inputs + columns[None, :]
    base = tl.load(weight + place, mask=inside, other=0.0)
    first = column // 32
    word = words + row.to(tl.int64) * row_words + first
    low = tl.load(word, mask=row < masked, other=0)
    high = tl.load(word + 1, mask=row < tl.where(first + 1 < row_words, masked, 0), other=0)
    shift = tl.arange(0, WIDE)[None, :]
    bits = (tl.where(shift < 32, low[:, None], high[:, None]) >> (shift % 32)) & 1
    more = tl.load(delta + place, mask=inside & (row < masked)[:, None], other=0.0).to(tl.float32) * scale
    return (base.to(tl.float32) + tl.where(bits == 1, more, 0.0)).to(base.dtype)


@triton.jit
def _routed_kernel(
    rows, weight, delta, words, scales, order, blocks, out, outputs, inputs, row_words, count,
    SCALED: tl.constexpr, TRANSPOSED: tl.constexpr, CAST: tl.constexpr,
    TOKENS: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Programs of one tile of weights follow each other: the second finds it in the cache.
    block = tl.program_id(0) % count
    tile = tl.program_id(0) // count
    route = tl.load(blocks + block * 3)
    start = tl.load(blocks + block * 3 + 1)
    stop = tl.load(blocks + block * 3 + 2)
    if start >= stop:
        return
    place = start + tl.arange(0, TOKENS)
    token = tl.load(order + place, mask=place < stop, other=0).to(tl.int64)
    there = (place < stop)[:, None]
    # The base has no mask: no row of one is read.
    masked = tl.where(route >= 0, outputs, 0)
    known = tl.maximum(route, 0)
    words += known.to(tl.int64) * outputs * row_words
    scale = 1.0
    if SCALED:
        scale = tl.load(scales + known)
    if TRANSPOSED:
        column = tile * WIDE
        total = tl.zeros([TOKENS, WIDE], tl.float32)
        for step in range(0, outputs, TALL):
            row = step + tl.arange(0, TALL)
            mine = tl.load(
                rows + token[:, None] * outputs + row[None, :],
                mask=there & (row < outputs)[None, :],
                other=0.0,
            )
            rebuilt = _weights(
                weight, delta, words, scale, row, column, outputs, inputs, row_words, masked, WIDE
            ).to(mine.dtype)
            total += tl.dot(mine.to(CAST), rebuilt.to(CAST), input_precision="ieee")
        columns = column + tl.arange(0, WIDE)
        tl.store(
            out + token[:, None] * inputs + columns[None, :],
            total.to(out.dtype.element_ty),
            mask=there & (columns < inputs)[None, :],
        )
    else:
        row = tile * TALL + tl.arange(0, TALL)
        total = tl.zeros([TOKENS, TALL], tl.float32)
        for column in range(0, inputs, WIDE):
            columns = column + tl.arange(0, WIDE)
            mine = tl.load(
                rows + token[:, None] * inputs + columns[None, :],
                mask=there & (columns < inputs)[None, :],
                other=0.0,
            )
            rebuilt = _weights(
                weight, delta, words, scale, row, column, outputs, inputs, row_words, masked, WIDE
            ).to(mine.dtype)
            total += tl.dot(mine.to(CAST), tl.trans(rebuilt.to(CAST)), input_precision="ieee")
        tl.store(
            out + token[:, None] * outputs + row[None, :],
            total.to(out.dtype.element_ty),
            mask=there & (row < outputs)[None, :],
        )


def blocks_of(routes_T: torch.Tensor, masks: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens in the order of their routes, and blocks of at most ``size`` tokens of one route each.

    Blocks are rows of (route, first place in the order, place behind the last); surplus ones are empty. Their number
    follows from shapes alone.
    """
    tokens, group_T = len(routes_T), routes_T.long() + 1
    order_T = group_T.argsort(stable=True)
    counts = torch.zeros(masks + 1, dtype=torch.int64, device=routes_T.device)
    counts.scatter_add_(0, group_T, torch.ones_like(group_T))
    needed = (counts + size - 1) // size
    # Every route that occurs has at most one block that is not full.
    block = torch.arange(tokens // size + min(tokens, masks + 1), device=routes_T.device)
    behind = needed.cumsum(0)
    group = torch.searchsorted(behind, block, right=True)
    known = group.clamp_max(masks)
    first = counts.cumsum(0) - counts
    start = first[known] + (block - (behind - needed)[known]) * size
    stop = torch.minimum(start + size, (first + counts)[known])
    empty = group > masks
    table = torch.stack([known - 1, start.masked_fill(empty, 0), stop.masked_fill(empty, 0)], 1)
    return order_T.to(torch.int32), table.to(torch.int32)


def _shape(tokens: int, outputs: int, half: bool, device: torch.device) -> dict[str, int]:
    """Return block sizes: with few tokens many small tiles of weights, which are all that is read; else large ones."""
    if tokens <= 64:
        return {"TOKENS": 16, "TALL": 16 if outputs <= 8192 else 32, "num_warps": 4, "num_stages": 4}
    if not half or tokens <= 512:
        return {"TOKENS": 32, "TALL": 64, "num_warps": 4, "num_stages": 2}
    room = 0
    if device.type == "cuda":
        room = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    # A stage takes 40 KiB; where there is room for it, one more is on its way.
    return {"TOKENS": 64, "TALL": 128, "num_warps": 8, "num_stages": 3 if room >= 160 * 1024 else 2}


def routed(
    rows_TX: torch.Tensor,
    weight_OI: torch.Tensor,
    delta_OI: torch.Tensor,
    words_KOW: torch.Tensor,
    routes_T: torch.Tensor,
    scales_K: torch.Tensor | None,
    *,
    transposed: bool,
) -> torch.Tensor:
    """Multiply contiguous rows (T x I; transposed: T x O) by their routes' weights; returns T x O (T x I)."""
    outputs, inputs = weight_OI.shape
    out = rows_TX.new_empty(rows_TX.shape[0], inputs if transposed else outputs)
    if not out.numel():
        return out
    if not rows_TX.shape[1]:
        return out.zero_()
    half = rows_TX.dtype != torch.float32 and weight_OI.dtype != torch.float32
    shape: dict[str, Any] = _shape(len(rows_TX), outputs, half, rows_TX.device)
    order_T, blocks = blocks_of(routes_T, words_KOW.shape[0], shape["TOKENS"])
    # With no mask at all every token has the base's weights, and nothing is read through these pointers.
    words = words_KOW if words_KOW.numel() else blocks
    scales = scales_K if words_KOW.shape[0] else None
    tiles = triton.cdiv(inputs, _WIDE) if transposed else triton.cdiv(outputs, shape["TALL"])
    # The interpreter's products of half precision are wrong, so it multiplies in float32.
    kinds = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    _routed_kernel[(len(blocks) * tiles,)](
        rows_TX, weight_OI, delta_OI, words, blocks if scales is None else scales, order_T, blocks, out,
        outputs, inputs, words_KOW.shape[2], len(blocks),
        SCALED=scales is not None, TRANSPOSED=transposed,
        CAST=tl.float32 if INTERPRETED else kinds[rows_TX.dtype],
        WIDE=_WIDE, **shape,
    )  # fmt: skip
    return out
