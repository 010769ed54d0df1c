"""Triton kernels of :mod:`graftwork_kernels.packed_matmul`.

Shape suffixes: T rows of x, N outputs, K inputs, W words of a row, G groups of a row, R rank of the correction.
"""

# Pyright takes kernels for Python.
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from graftwork_kernels.tiles import dot


@triton.jit
def _weight(
    packed_ptr, scale_ptr, zero_ptr, n_N, k_K, tile, n, k, words, groups, group,
    BITS: tl.constexpr, HAS_ZERO: tl.constexpr, ONE_GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return a tile of the weight (N x K, float32); ``tile`` counts its columns' tiles, ``k_K`` names its columns."""
    PER: tl.constexpr = 32 // BITS
    BW: tl.constexpr = BK // PER
    LEVELS: tl.constexpr = (1 << BITS) - 1
    w_W = tile * BW + tl.arange(0, BW)
    real_N = n_N < n
    word_NW = tl.load(
        packed_ptr + n_N.to(tl.int64)[:, None] * words + w_W[None, :],
        mask=real_N[:, None] & (w_W < words)[None, :], other=0,
    )  # fmt: skip
    code_NK = tl.reshape(
        (word_NW[:, :, None] >> (tl.arange(0, PER) * BITS)[None, None, :]) & LEVELS, (BN, BK)
    ).to(tl.float32)
    # Where the whole tile lies in one group of each row, one scale a row is read.
    g_G = tl.zeros((1,), tl.int32) + (tile * BK) // group if ONE_GROUP else k_K // group
    real_NG = real_N[:, None] & (g_G < groups)[None, :]
    scale_NG = tl.load(
        scale_ptr + n_N.to(tl.int64)[:, None] * groups + g_G[None, :], mask=real_NG, other=0.0
    ).to(tl.float32)
    if HAS_ZERO:
        word_NG = tl.load(
            zero_ptr + (n_N // PER).to(tl.int64)[:, None] * groups + g_G[None, :], mask=real_NG, other=0
        )
        zero_NG = ((word_NG >> ((n_N % PER) * BITS)[:, None]) & LEVELS).to(tl.float32)
        return (code_NK - zero_NG) * scale_NG
    return (code_NK - (1 << (BITS - 1))) * scale_NG


@triton.jit
def forward_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, into_ptr, out_ptr, low_ptr, left_ptr, bias_ptr, y_ptr,
    t, n, k, words, groups, group, rank,
    BITS: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_INTO: tl.constexpr, HAS_OUT: tl.constexpr, HAS_LOW: tl.constexpr,
    HAS_BIAS: tl.constexpr, ONE_GROUP: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Write ``((x * into) W^T) * out + low left^T + bias``, all but the last rounding in float32."""
    t_T = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    n_N = tl.program_id(0) * BN + tl.arange(0, BN)
    real_T, real_N = t_T < t, n_N < n
    y_TN = tl.zeros((BT, BN), tl.float32)
    for tile in range(tl.cdiv(k, BK)):
        k_K = tile * BK + tl.arange(0, BK)
        x_TK = tl.load(
            x_ptr + t_T[:, None] * k + k_K[None, :], mask=real_T[:, None] & (k_K < k)[None, :], other=0.0
        )
        if HAS_INTO:
            into_K = tl.load(into_ptr + k_K, mask=k_K < k, other=0.0).to(tl.float32)
            x_TK = (x_TK.to(tl.float32) * into_K[None, :]).to(x_ptr.dtype.element_ty)
        w_NK = _weight(
            packed_ptr, scale_ptr, zero_ptr, n_N, k_K, tile, n, k, words, groups, group, BITS, HAS_ZERO, ONE_GROUP,
            BN, BK,
        ).to(x_ptr.dtype.element_ty)  # fmt: skip
        y_TN = dot(x_TK, tl.trans(w_NK), y_TN)
    if HAS_OUT:
        y_TN = y_TN * tl.load(out_ptr + n_N, mask=real_N, other=0.0).to(tl.float32)[None, :]
    if HAS_LOW:
        for first in range(0, rank, BR):
            r_R = first + tl.arange(0, BR)
            low_TR = tl.load(
                low_ptr + t_T[:, None] * rank + r_R[None, :], mask=real_T[:, None] & (r_R < rank)[None, :], other=0.0
            )  # fmt: skip
            left_NR = tl.load(
                left_ptr + n_N.to(tl.int64)[:, None] * rank + r_R[None, :],
                mask=real_N[:, None] & (r_R < rank)[None, :], other=0.0,
            )  # fmt: skip
            y_TN = dot(low_TR, tl.trans(left_NR), y_TN)
    if HAS_BIAS:
        y_TN += tl.load(bias_ptr + n_N, mask=real_N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + t_T[:, None] * n + n_N[None, :], y_TN.to(y_ptr.dtype.element_ty), mask=real_T[:, None] & real_N[None, :]
    )  # fmt: skip


@triton.jit
def backward_kernel(
    grad_ptr, packed_ptr, scale_ptr, zero_ptr, into_ptr, out_ptr, low_ptr, right_ptr, dx_ptr,
    t, n, k, words, groups, group, rank,
    BITS: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_INTO: tl.constexpr, HAS_OUT: tl.constexpr, HAS_LOW: tl.constexpr,
    ONE_GROUP: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """Write ``((grad * out) W) * into + low right``, with ``low = grad left``."""
    t_T = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    tile = tl.program_id(0)
    k_K = tile * BK + tl.arange(0, BK)
    real_T, real_K = t_T < t, k_K < k
    dx_TK = tl.zeros((BT, BK), tl.float32)
    for first in range(0, n, BN):
        n_N = first + tl.arange(0, BN)
        grad_TN = tl.load(
            grad_ptr + t_T[:, None] * n + n_N[None, :], mask=real_T[:, None] & (n_N < n)[None, :], other=0.0
        )
        if HAS_OUT:
            out_N = tl.load(out_ptr + n_N, mask=n_N < n, other=0.0).to(tl.float32)
            grad_TN = (grad_TN.to(tl.float32) * out_N[None, :]).to(grad_ptr.dtype.element_ty)
        w_NK = _weight(
            packed_ptr, scale_ptr, zero_ptr, n_N, k_K, tile, n, k, words, groups, group, BITS, HAS_ZERO, ONE_GROUP,
            BN, BK,
        ).to(grad_ptr.dtype.element_ty)  # fmt: skip
        dx_TK = dot(grad_TN, w_NK, dx_TK)
    if HAS_INTO:
        dx_TK = dx_TK * tl.load(into_ptr + k_K, mask=real_K, other=0.0).to(tl.float32)[None, :]
    if HAS_LOW:
        for first in range(0, rank, BR):
            r_R = first + tl.arange(0, BR)
            low_TR = tl.load(
                low_ptr + t_T[:, None] * rank + r_R[None, :], mask=real_T[:, None] & (r_R < rank)[None, :], other=0.0
            )  # fmt: skip
            right_RK = tl.load(
                right_ptr + r_R.to(tl.int64)[:, None] * k + k_K[None, :],
                mask=(r_R < rank)[:, None] & real_K[None, :], other=0.0,
            )  # fmt: skip
            dx_TK = dot(low_TR, right_RK, dx_TK)
    tl.store(
        dx_ptr + t_T[:, None] * k + k_K[None, :], dx_TK.to(dx_ptr.dtype.element_ty),
        mask=real_T[:, None] & real_K[None, :],
    )  # fmt: skip


def _tiles(t: int, group: int, groups: int) -> dict[str, int]:
    """Return the tile's sizes: few rows (decoding) want many programs, many rows want large tiles."""
    rows = min(64, max(16, triton.next_power_of_2(t)))
    columns = 64 if groups == 1 or group % 64 == 0 else 32
    return {
        "BT": rows, "BN": 32 if rows == 16 else 64, "BK": columns, "BR": 32,
        "ONE_GROUP": groups == 1 or group % columns == 0,
        "num_warps": 4, "num_stages": 3,
    }  # fmt: skip


def launch_forward(
    x_TK: torch.Tensor, packed_NW: torch.Tensor, scale_NG: torch.Tensor, zero: torch.Tensor | None,
    into: torch.Tensor | None, out: torch.Tensor | None, low_TR: torch.Tensor | None, left_NR: torch.Tensor | None,
    bias: torch.Tensor | None, y_TN: torch.Tensor, bits: int,
) -> None:  # fmt: skip
    """Fill ``y_TN``; all are contiguous, and none is empty."""
    (t, k), (n, words), groups = x_TK.shape, packed_NW.shape, scale_NG.shape[1]
    tiles = _tiles(t, k // groups, groups)
    any_ = x_TK
    grid = (triton.cdiv(n, tiles["BN"]), triton.cdiv(t, tiles["BT"]))
    forward_kernel[grid](
        x_TK, packed_NW, scale_NG, any_ if zero is None else zero, any_ if into is None else into,
        any_ if out is None else out, any_ if low_TR is None else low_TR, any_ if left_NR is None else left_NR,
        any_ if bias is None else bias, y_TN,
        t, n, k, words, groups, k // groups, 0 if low_TR is None else low_TR.shape[1],
        BITS=bits, HAS_ZERO=zero is not None, HAS_INTO=into is not None, HAS_OUT=out is not None,
        HAS_LOW=low_TR is not None, HAS_BIAS=bias is not None, **tiles,
    )  # fmt: skip


def launch_backward(
    grad_TN: torch.Tensor, packed_NW: torch.Tensor, scale_NG: torch.Tensor, zero: torch.Tensor | None,
    into: torch.Tensor | None, out: torch.Tensor | None, low_TR: torch.Tensor | None, right_RK: torch.Tensor | None,
    dx_TK: torch.Tensor, bits: int,
) -> None:  # fmt: skip
    """Fill ``dx_TK``; all are contiguous, and none is empty."""
    (t, k), (n, words), groups = dx_TK.shape, packed_NW.shape, scale_NG.shape[1]
    tiles = _tiles(t, k // groups, groups)
    any_ = grad_TN
    grid = (triton.cdiv(k, tiles["BK"]), triton.cdiv(t, tiles["BT"]))
    backward_kernel[grid](
        grad_TN, packed_NW, scale_NG, any_ if zero is None else zero, any_ if into is None else into,
        any_ if out is None else out, any_ if low_TR is None else low_TR, any_ if right_RK is None else right_RK,
        dx_TK, t, n, k, words, groups, k // groups, 0 if low_TR is None else low_TR.shape[1],
        BITS=bits, HAS_ZERO=zero is not None, HAS_INTO=into is not None, HAS_OUT=out is not None,
        HAS_LOW=low_TR is not None, **tiles,
    )  # fmt: skip
