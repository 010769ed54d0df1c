"""Triton kernels of :mod:`graftwork_kernels.masked_delta`: every program has some words and the 32 entries of each.

Memory-bound. A word is read once and its bits are shifted out in registers; entries of a word are neighbours in memory.
Block sizes are fixed: there is nothing to choose by shape where nothing is used twice.
"""

# Arguments and options of kernels are Triton's own language.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 64  # Words a program: 2048 entries.


@triton.jit
def _places(words, columns, row_words, BLOCK: tl.constexpr):
    """Return of each word its place and whether it exists, and of its entries their places and whether they exist."""
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = word < words
    row = word // row_words
    bit = tl.arange(0, 32)
    column = (word - row * row_words)[:, None] * 32 + bit[None, :]
    return word, there, (row * columns)[:, None] + column, there[:, None] & (column < columns)


@triton.jit
def _pack_kernel(mask, out, words, columns, row_words, BLOCK: tl.constexpr):
    word, there, entry, inside = _places(words, columns, row_words, BLOCK)
    bits = (tl.load(mask + entry, mask=inside, other=0) != 0).to(tl.int32)
    # Different bits: their sum is their union.
    packed = tl.sum(bits << tl.arange(0, 32)[None, :], axis=1)
    tl.store(out + word, packed.to(tl.int32), mask=there)


@triton.jit
def _unpack_kernel(packed, out, words, columns, row_words, BLOCK: tl.constexpr):
    word, there, entry, inside = _places(words, columns, row_words, BLOCK)
    value = tl.load(packed + word, mask=there, other=0)
    bits = (value[:, None] >> tl.arange(0, 32)[None, :]) & 1
    tl.store(out + entry, bits.to(tl.int8), mask=inside)


@triton.jit
def _add_kernel(base, delta, packed, out, scale, words, columns, row_words, BLOCK: tl.constexpr):
    word, there, entry, inside = _places(words, columns, row_words, BLOCK)
    value = tl.load(packed + word, mask=there, other=0)
    bits = (value[:, None] >> tl.arange(0, 32)[None, :]) & 1
    own = tl.load(base + entry, mask=inside, other=0.0)
    # All of it is loaded: loads that skip entries are no longer wide ones.
    more = tl.load(delta + entry, mask=inside, other=0.0).to(tl.float32) * scale
    more = tl.where(bits == 1, more, 0.0)
    found = (own.to(tl.float32) + more).to(own.dtype)
    tl.store(out + entry, tl.where(more == 0.0, own, found), mask=inside)


def pack(mask_RC: torch.Tensor) -> torch.Tensor:
    """Pack a contiguous bool mask."""
    rows, columns = mask_RC.shape
    out = mask_RC.new_empty(rows, triton.cdiv(columns, 32), dtype=torch.int32)
    if out.numel():
        grid = (triton.cdiv(out.numel(), _BLOCK),)
        _pack_kernel[grid](mask_RC.view(torch.int8), out, out.numel(), columns, out.shape[1], BLOCK=_BLOCK)
    return out


def unpack(words_RW: torch.Tensor, columns: int) -> torch.Tensor:
    """Unpack contiguous words."""
    rows, row_words = words_RW.shape
    out = words_RW.new_empty(rows, columns, dtype=torch.int8)
    if out.numel():
        grid = (triton.cdiv(words_RW.numel(), _BLOCK),)
        _unpack_kernel[grid](words_RW, out, words_RW.numel(), columns, row_words, BLOCK=_BLOCK)
    return out.view(torch.bool)


def add(base_RC: torch.Tensor, delta_RC: torch.Tensor, words_RW: torch.Tensor, scale: float) -> torch.Tensor:
    """Return base plus scaled difference under the mask; all contiguous."""
    out = torch.empty_like(base_RC)
    if out.numel():
        grid = (triton.cdiv(words_RW.numel(), _BLOCK),)
        # A product and a sum, each rounded, as elsewhere: the result depends on no device.
        _add_kernel[grid](
            base_RC, delta_RC, words_RW, out, float(scale), words_RW.numel(), base_RC.shape[1], words_RW.shape[1],
            BLOCK=_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return out
