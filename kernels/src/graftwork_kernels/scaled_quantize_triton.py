"""Triton kernels of :mod:`graftwork_kernels.scaled_quantize`: a few rows a program, all in registers.

Shape suffixes: R rows of a program, D their values with filling, S slices of a row, G values of a slice. A row of d
values is laid out as B x C x P: blocks, order of the core, power of two, each filled up to a power of two. Filling is
zero, and zero is in every range, so it needs no mask where extremes are taken.
"""

# Pyright takes kernels for Python.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MOST_VALUES = 32768
"""Longest row, with filling, that a program holds."""
MOST_CORE = 64
"""Largest core of a Hadamard matrix, with filling, that a program multiplies with."""


@dataclass(frozen=True)
class Plan:
    """How rows of d values lie in a program."""

    blocks: int
    core: int
    power: int
    blocks_filled: int
    core_filled: int
    rows: int

    @property
    def values(self) -> int:
        return self.blocks_filled * self.core_filled * self.power

    @property
    def warps(self) -> int:
        return min(16, max(4, self.rows * self.values // 512))


def plan(d: int, block: int, core: int, group: int | None) -> Plan | None:
    """Return the layout for rows of ``d`` values, None where no program holds them.

    ``block`` is the order of the Hadamard matrix (1: none) and ``core`` the part of it that is no power of two.
    """
    if group is not None and group & (group - 1):
        return None
    power = block // core
    # A word of two-bit codes has sixteen values.
    blocks_filled = max(triton.next_power_of_2(d // block), 16 // block)
    core_filled = 1 if core == 1 else max(16, triton.next_power_of_2(core))
    # Slices and words lie within what is not filled; products want sixteen columns.
    if core > 1 and (power < 16 or power % (group or 1) or core_filled > MOST_CORE):
        return None
    values = blocks_filled * core_filled * power
    if values > MOST_VALUES:
        return None
    return Plan(d // block, core, power, blocks_filled, core_filled, rows=max(1, 2048 // values))


@triton.jit
def _place(
    i, B: tl.constexpr, K: tl.constexpr, B_FILLED: tl.constexpr, K_FILLED: tl.constexpr, P: tl.constexpr
):
    """Return where entry ``i`` of the filled row stands in the real one, and whether it does."""
    b = i // (K_FILLED * P)
    k = (i // P) % K_FILLED
    return b * (K * P) + k * P + i % P, (b < B) & (k < K)


@triton.jit
def _turn(
    y_RD, core_ptr, norm, TRANSPOSED: tl.constexpr, R: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
    B_FILLED: tl.constexpr, K_FILLED: tl.constexpr, P: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """Multiply every block with the Hadamard matrix, or with its transpose: butterflies, then the core."""
    D: tl.constexpr = B_FILLED * K_FILLED * P
    y = y_RD
    for i in tl.static_range(LOG):
        y = tl.reshape(y, (R * D // (2 << i), 2, 1 << i))
        a, b = tl.split(tl.permute(y, (0, 2, 1)))
        y = tl.permute(tl.join(a + b, a - b), (0, 2, 1))
    if K_FILLED > 1:
        k = tl.arange(0, K_FILLED)
        j = tl.arange(0, K_FILLED)
        at = k[:, None] * K + j[None, :] if TRANSPOSED else j[None, :] * K + k[:, None]
        core = tl.load(core_ptr + at, mask=(k[:, None] < K) & (j[None, :] < K), other=0.0)
        y = tl.reshape(y, (R * B_FILLED, K_FILLED, P))
        y = tl.reshape(tl.permute(y, (1, 0, 2)), (K_FILLED, R * B_FILLED * P))
        y = tl.dot(core, y, input_precision="ieee")
        y = tl.permute(tl.reshape(y, (K_FILLED, R * B_FILLED, P)), (1, 0, 2))
    return tl.reshape(y, (R, D)) * norm


@triton.jit
def _rounded(u):
    """Round half to even what is smaller than 2^22 in size."""
    return (u + 12582912.0) - 12582912.0


@triton.jit
def _values(
    x_ptr, diagonal_ptr, core_ptr, norm, row_R, n, d, HAS_DIAGONAL: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
    K: tl.constexpr, B_FILLED: tl.constexpr, K_FILLED: tl.constexpr, P: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """Return the rows scaled and turned, where they stand, and whether they do."""
    D: tl.constexpr = B_FILLED * K_FILLED * P
    at_D, real_D = _place(tl.arange(0, D), B, K, B_FILLED, K_FILLED, P)
    real_RD = (row_R < n)[:, None] & real_D[None, :]
    at_RD = row_R.to(tl.int64)[:, None] * d + at_D[None, :]
    y_RD = tl.load(x_ptr + at_RD, mask=real_RD, other=0.0).to(tl.float32)
    if HAS_DIAGONAL:
        y_RD = y_RD * tl.load(diagonal_ptr + at_D, mask=real_D, other=0.0).to(tl.float32)[None, :]
    if LOG > 0 or K_FILLED > 1:
        y_RD = _turn(y_RD, core_ptr, norm, False, R, B, K, B_FILLED, K_FILLED, P, LOG)
    return y_RD, at_RD, real_RD


@triton.jit
def _ranges(
    y_RSG, high_RS, low_RS, divisor, ratio, floor, least, most, SYMMETRIC: tl.constexpr
):  # fmt: skip
    """Return the extremes, the range that is kept, the scale before and after its floor, and the zero point."""
    top_RS = tl.maximum(tl.max(y_RSG, 2), 0.0)
    bottom_RS = tl.minimum(tl.min(y_RSG, 2), 0.0)
    hi_RS = top_RS * high_RS * ratio
    lo_RS = bottom_RS * low_RS * ratio
    if SYMMETRIC:
        raw_RS = tl.div_rn(tl.maximum(hi_RS, -lo_RS), tl.zeros_like(hi_RS) + divisor)
    else:
        raw_RS = tl.div_rn(hi_RS - lo_RS, tl.zeros_like(hi_RS) + divisor)
    # A slice with NaN has no scale: a maximum alone would pass over it.
    nan_RS = tl.sum((y_RSG != y_RSG).to(tl.int32), 2) > 0
    scale_RS = tl.where(nan_RS, float("nan"), tl.maximum(raw_RS, floor))
    if SYMMETRIC:
        zero_RS = tl.zeros_like(hi_RS)
    else:
        zero_RS = least - tl.div_rn(lo_RS, scale_RS)
        zero_RS = _rounded(tl.minimum(tl.maximum(zero_RS, least), most))
    return top_RS, bottom_RS, hi_RS, lo_RS, raw_RS, scale_RS, zero_RS


@triton.jit
def _slices(
    x_ptr, diagonal_ptr, core_ptr, high_ptr, low_ptr, row_R, n, d, groups, share_step, norm,
    HAS_DIAGONAL: tl.constexpr, HAS_SHARES: tl.constexpr, R: tl.constexpr, S: tl.constexpr, G: tl.constexpr,
    B: tl.constexpr, K: tl.constexpr, B_FILLED: tl.constexpr, K_FILLED: tl.constexpr, P: tl.constexpr,
    LOG: tl.constexpr,
):  # fmt: skip
    """Return the values by slice, where they stand and which are real, the same of their slices, and both shares."""
    y_RD, at_RD, real_RD = _values(
        x_ptr, diagonal_ptr, core_ptr, norm, row_R, n, d, HAS_DIAGONAL, R, B, K, B_FILLED, K_FILLED, P, LOG
    )
    y_RSG = tl.reshape(y_RD, (R, S, G))
    slice_S, real_S = _place(tl.arange(0, S) * G, B, K, B_FILLED, K_FILLED, P)
    slice_RS = row_R.to(tl.int64)[:, None] * groups + (slice_S // G if S > 1 else slice_S)[None, :]
    real_RS = (row_R < n)[:, None] & real_S[None, :]
    if HAS_SHARES:
        high_RS = tl.load(high_ptr + slice_RS * share_step, mask=real_RS, other=1.0)
        low_RS = tl.load(low_ptr + slice_RS * share_step, mask=real_RS, other=1.0)
    else:
        high_RS = tl.full((R, S), 1.0, tl.float32)
        low_RS = tl.full((R, S), 1.0, tl.float32)
    return y_RSG, at_RD, real_RD, slice_RS, real_RS, high_RS, low_RS


@triton.jit
def quantize_kernel(
    x_ptr, diagonal_ptr, core_ptr, high_ptr, low_ptr, out_ptr, scale_ptr, zero_ptr, n, d, groups, words, share_step,
    norm, divisor, ratio, floor, least, most,
    HAS_DIAGONAL: tl.constexpr, HAS_SHARES: tl.constexpr, SYMMETRIC: tl.constexpr, FAKE: tl.constexpr,
    BITS: tl.constexpr, PER_WORD: tl.constexpr, R: tl.constexpr, S: tl.constexpr, G: tl.constexpr, B: tl.constexpr,
    K: tl.constexpr, B_FILLED: tl.constexpr, K_FILLED: tl.constexpr, P: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """Write values (FAKE), codes (PER_WORD 1) or packed codes, and, where not FAKE, scales and zero points."""
    D: tl.constexpr = B_FILLED * K_FILLED * P
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    y_RSG, at_RD, real_RD, slice_RS, real_RS, high_RS, low_RS = _slices(
        x_ptr, diagonal_ptr, core_ptr, high_ptr, low_ptr, row_R, n, d, groups, share_step, norm, HAS_DIAGONAL,
        HAS_SHARES, R, S, G, B, K, B_FILLED, K_FILLED, P, LOG,
    )  # fmt: skip
    _, _, _, _, _, scale_RS, zero_RS = _ranges(
        y_RSG, high_RS, low_RS, divisor, ratio, floor, least, most, SYMMETRIC
    )
    u_RSG = tl.div_rn(y_RSG, tl.broadcast_to(scale_RS[:, :, None], (R, S, G))) + zero_RS[:, :, None]
    q_RSG = _rounded(tl.minimum(tl.maximum(u_RSG, least), most))
    if FAKE:
        value_RSG = (q_RSG - zero_RS[:, :, None]) * scale_RS[:, :, None]
        # What is not finite leaves nothing of its slice, as in PyTorch.
        value_RSG = tl.where((scale_RS < float("inf"))[:, :, None], value_RSG, float("nan"))
        value_RD = tl.reshape(value_RSG, (R, D))
        tl.store(out_ptr + at_RD, value_RD.to(out_ptr.dtype.element_ty), mask=real_RD)
    else:
        tl.store(scale_ptr + slice_RS, scale_RS, mask=real_RS)
        if not SYMMETRIC:
            tl.store(zero_ptr + slice_RS, zero_RS.to(tl.int8), mask=real_RS)
        q_RD = tl.reshape(q_RSG, (R, D)).to(tl.int32)
        if PER_WORD == 1:
            tl.store(out_ptr + at_RD, q_RD.to(tl.int8), mask=real_RD)
        else:
            u_RD = tl.where(real_RD, q_RD + (1 << (BITS - 1)), 0)
            W: tl.constexpr = D // PER_WORD
            word_RW = tl.sum(
                tl.reshape(u_RD, (R, W, PER_WORD)) << (tl.arange(0, PER_WORD) * BITS)[None, None, :], 2
            )
            first_W, real_W = _place(tl.arange(0, W) * PER_WORD, B, K, B_FILLED, K_FILLED, P)
            to_RW = row_R.to(tl.int64)[:, None] * words + (first_W // PER_WORD)[None, :]
            stands_W = real_W & (first_W < d)
            tl.store(out_ptr + to_RW, word_RW, mask=(row_R < n)[:, None] & stands_W[None, :])


@triton.jit
def backward_kernel(
    grad_ptr, x_ptr, diagonal_ptr, core_ptr, high_ptr, low_ptr, out_ptr, grad_high_ptr, grad_low_ptr, n, d, groups,
    share_step, norm, divisor, ratio, floor, least, most,
    HAS_DIAGONAL: tl.constexpr, HAS_SHARES: tl.constexpr, SYMMETRIC: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    G: tl.constexpr, B: tl.constexpr, K: tl.constexpr, B_FILLED: tl.constexpr, K_FILLED: tl.constexpr,
    P: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """Write the gradient to ``x * diagonal`` and to the shares; it is what
    autograd makes of the reference."""
    D: tl.constexpr = B_FILLED * K_FILLED * P
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    y_RSG, at_RD, real_RD, slice_RS, real_RS, high_RS, low_RS = _slices(
        x_ptr, diagonal_ptr, core_ptr, high_ptr, low_ptr, row_R, n, d, groups, share_step, norm, HAS_DIAGONAL,
        HAS_SHARES, R, S, G, B, K, B_FILLED, K_FILLED, P, LOG,
    )  # fmt: skip
    top_RS, bottom_RS, hi_RS, lo_RS, raw_RS, scale_RS, zero_RS = _ranges(
        y_RSG, high_RS, low_RS, divisor, ratio, floor, least, most, SYMMETRIC
    )
    grad_RD = tl.load(grad_ptr + at_RD, mask=real_RD, other=0.0).to(tl.float32)
    grad_RSG = tl.reshape(grad_RD, (R, S, G))
    plain_RSG = tl.div_rn(y_RSG, tl.broadcast_to(scale_RS[:, :, None], (R, S, G)))
    u_RSG = plain_RSG + zero_RS[:, :, None]
    inside_RSG = (u_RSG >= least) & (u_RSG <= most)
    q_RSG = _rounded(tl.minimum(tl.maximum(u_RSG, least), most))
    left_RSG = (q_RSG - zero_RS[:, :, None]) - tl.where(inside_RSG, plain_RSG, 0.0)
    of_scale_RS = tl.sum(grad_RSG * left_RSG, 2)
    of_lo_RS = tl.zeros_like(scale_RS)
    if not SYMMETRIC:
        of_zero_RS = -tl.sum(tl.where(inside_RSG, 0.0, grad_RSG), 2) * scale_RS
        exact_RS = least - tl.div_rn(lo_RS, scale_RS)
        of_zero_RS = tl.where((exact_RS >= least) & (exact_RS <= most), of_zero_RS, 0.0)
        of_lo_RS = -of_zero_RS / scale_RS
        # Squares of small scales would be zero.
        of_scale_RS -= of_lo_RS * (lo_RS / scale_RS)
    of_scale_RS = tl.where(raw_RS >= floor, of_scale_RS, 0.0) / divisor
    if SYMMETRIC:
        of_hi_RS = tl.where(hi_RS > -lo_RS, of_scale_RS, tl.where(hi_RS == -lo_RS, of_scale_RS * 0.5, 0.0))
        of_lo_RS = of_hi_RS - of_scale_RS
    else:
        of_hi_RS = of_scale_RS
        of_lo_RS -= of_scale_RS
    of_hi_RS *= ratio
    of_lo_RS *= ratio
    if HAS_SHARES:
        tl.store(grad_high_ptr + slice_RS, of_hi_RS * top_RS, mask=real_RS)
        tl.store(grad_low_ptr + slice_RS, of_lo_RS * bottom_RS, mask=real_RS)
    of_hi_RS *= high_RS
    of_lo_RS *= low_RS
    # Extremes that occur several times share their gradient.
    real_RSG = tl.reshape(real_RD, (R, S, G))
    highest_RSG = ((y_RSG == top_RS[:, :, None]) & real_RSG).to(tl.float32)
    lowest_RSG = ((y_RSG == bottom_RS[:, :, None]) & real_RSG).to(tl.float32)
    of_hi_RS = of_hi_RS / tl.maximum(tl.sum(highest_RSG, 2), 1.0)
    of_lo_RS = of_lo_RS / tl.maximum(tl.sum(lowest_RSG, 2), 1.0)
    of_y_RSG = tl.where(inside_RSG, grad_RSG, 0.0)
    of_y_RSG += highest_RSG * of_hi_RS[:, :, None] + lowest_RSG * of_lo_RS[:, :, None]
    of_y_RD = tl.reshape(of_y_RSG, (R, D))
    if LOG > 0 or K_FILLED > 1:
        of_y_RD = _turn(of_y_RD, core_ptr, norm, True, R, B, K, B_FILLED, K_FILLED, P, LOG)
    tl.store(out_ptr + at_RD, of_y_RD, mask=real_RD)


def _shared(
    plan: Plan, d: int, group: int | None, bits: int, symmetric: bool, half_range: bool
) -> tuple[dict[str, int], tuple[float, float, float, float]]:
    size = group or plan.values
    shape = {
        "R": plan.rows, "S": plan.values // size, "G": size, "B": plan.blocks, "K": plan.core,
        "B_FILLED": plan.blocks_filled, "K_FILLED": plan.core_filled, "P": plan.power,
        "LOG": plan.power.bit_length() - 1,
    }  # fmt: skip
    steps = 2**bits - 1
    divisor = (steps / 2 if half_range else 2 ** (bits - 1) - 1) if symmetric else steps
    norm = 1 / math.sqrt(plan.core * plan.power)
    return shape, (norm, float(divisor), float(-(2 ** (bits - 1))), float(2 ** (bits - 1) - 1))


def launch_quantize(
    x_ND: torch.Tensor, diagonal: torch.Tensor | None, core: torch.Tensor | None, high: torch.Tensor | None,
    low: torch.Tensor | None, out: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, plan: Plan,
    bits: int, group: int | None, symmetric: bool, half_range: bool, ratio: float, floor: float, per_word: int,
) -> None:  # fmt: skip
    """Fill ``out`` and, where they are given, ``scale`` and ``zero``; ``x`` is contiguous, with at least one value."""
    n, d = x_ND.shape
    shape, (norm, divisor, least, most) = _shared(plan, d, group, bits, symmetric, half_range)
    any_ = x_ND
    quantize_kernel[(triton.cdiv(n, plan.rows),)](
        x_ND, any_ if diagonal is None else diagonal, any_ if core is None else core,
        any_ if high is None else high, any_ if low is None else low, out,
        any_ if scale is None else scale, any_ if zero is None else zero,
        n, d, d // (group or d), -(-d // per_word), 0 if high is None or high.numel() == 1 else 1,
        norm, divisor, ratio, floor, least, most,
        HAS_DIAGONAL=diagonal is not None, HAS_SHARES=high is not None, SYMMETRIC=symmetric, FAKE=scale is None,
        BITS=bits, PER_WORD=per_word, num_warps=plan.warps, **shape,
    )  # fmt: skip


def launch_backward(
    grad_ND: torch.Tensor, x_ND: torch.Tensor, diagonal: torch.Tensor | None, core: torch.Tensor | None,
    high: torch.Tensor | None, low: torch.Tensor | None, out_ND: torch.Tensor, grad_high: torch.Tensor,
    grad_low: torch.Tensor, plan: Plan, bits: int, group: int | None, symmetric: bool, half_range: bool,
    ratio: float, floor: float,
) -> None:  # fmt: skip
    """Fill ``out_ND`` (gradient to ``x * diagonal``, float32) and, where shares are given, theirs (N x groups)."""
    n, d = x_ND.shape
    shape, (norm, divisor, least, most) = _shared(plan, d, group, bits, symmetric, half_range)
    any_ = x_ND
    backward_kernel[(triton.cdiv(n, plan.rows),)](
        grad_ND, x_ND, any_ if diagonal is None else diagonal, any_ if core is None else core,
        any_ if high is None else high, any_ if low is None else low, out_ND, grad_high, grad_low,
        n, d, d // (group or d), 0 if high is None or high.numel() == 1 else 1,
        norm, divisor, ratio, floor, least, most,
        HAS_DIAGONAL=diagonal is not None, HAS_SHARES=high is not None, SYMMETRIC=symmetric,
        num_warps=plan.warps, **shape,
    )  # fmt: skip
