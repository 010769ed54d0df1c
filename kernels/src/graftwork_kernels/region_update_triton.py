"""The Triton kernel of :mod:`graftwork_kernels.region_update`: a product whose factors and result may differ in dtype,
added into scattered columns or stored.

Shape suffixes: M rows, N columns of the result, K what is summed over.
"""

# Launching a kernel takes what its signature does not have (num_warps), and constants as numbers.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from graftwork_kernels.tiles import dot

# How two tiles are multiplied. Three: an fp32 tile is the sum of three bfloat16 ones, and the other is bfloat16, so
# tensor cores give what a product in fp32 would.
_SAME, _THREE, _FP32 = 0, 1, 2


@triton.jit
def _dot_of_three(a, b, acc):
    """Return acc + a b for a in bfloat16 and b in fp32, smallest terms first."""
    high = b.to(tl.bfloat16)
    rest = b - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return dot(a, high, dot(a, middle, dot(a, low, acc)))


@triton.jit
def _product(
    a_MK, b_KN, y, columns_N, rows, columns, depth, a_row, a_col, b_row, b_col, y_row,
    SCATTER: tl.constexpr, WAY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[m, columns[n]] += (A B)[m, n], or y[m, n] = (A B)[m, n]; one tile.

    Tiles that share rows of A are neighbours: y is touched in whole lines as far as columns are near each other.
    """
    across = tl.cdiv(columns, BLOCK_N)
    pid = tl.program_id(0)
    m = (pid // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_in, n_in = m < rows, n < columns
    m, n = m.to(tl.int64), n.to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_in = k < depth
        k = k.to(tl.int64)
        a = tl.load(
            a_MK + m[:, None] * a_row + k[None, :] * a_col, mask=m_in[:, None] & k_in[None, :], other=0.0
        )
        b = tl.load(
            b_KN + k[:, None] * b_row + n[None, :] * b_col, mask=k_in[:, None] & n_in[None, :], other=0.0
        )
        if WAY == 0:
            acc = dot(a, b, acc)
        elif WAY == 1:
            acc = _dot_of_three(a, b, acc)
        else:
            acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    inside = m_in[:, None] & n_in[None, :]
    if SCATTER:
        n = tl.load(columns_N + n, mask=n_in, other=0).to(tl.int64)
    place = y + m[:, None] * y_row + n[None, :]
    if SCATTER:
        acc += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, acc.to(y.dtype.element_ty), mask=inside)


def product(
    a_MK: torch.Tensor, b_KN: torch.Tensor, y: torch.Tensor, columns_N: torch.Tensor | None = None
) -> None:
    """Store A B in ``y`` (M x N), or add it to columns ``columns_N`` of ``y``, each named once; in place.

    A and B may have any strides; y's columns are next to each other. Where one factor is bfloat16 and B fp32, the
    product is as exact as in fp32. Sums are in fp32.
    """
    (rows, depth), columns = a_MK.shape, b_KN.shape[1]
    if not rows or not columns:
        return
    if a_MK.dtype == b_KN.dtype:
        way = _SAME
    elif a_MK.dtype == torch.bfloat16 and b_KN.dtype == torch.float32:
        way = _THREE
    else:
        way = _FP32
    # Fixed, not tuned: the interpreter cannot tune. fp32 tiles take twice the memory, three terms twice more.
    half = way == _SAME and a_MK.dtype != torch.float32
    block_m, block_n, block_k = (128, 64, 64) if half else (64, 64, 32)
    block_m = min(block_m, max(16, triton.next_power_of_2(rows)))
    grid = (triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n),)
    _product[grid](
        a_MK, b_KN, y, a_MK if columns_N is None else columns_N, rows, columns, depth, *a_MK.stride(),
        *b_KN.stride(), y.stride(0), SCATTER=columns_N is not None, WAY=way, BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=block_k, num_warps=4,
    )  # fmt: skip


def mixed_product(a_MK: torch.Tensor, b_KN: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return A B in ``dtype``, for factors of any two dtypes, summed in fp32; none is copied into another dtype."""
    if a_MK.dtype == b_KN.dtype == dtype:
        return a_MK @ b_KN
    y_MN = torch.empty(a_MK.shape[0], b_KN.shape[1], dtype=dtype, device=a_MK.device)
    product(a_MK, b_KN, y_MN)
    return y_MN
