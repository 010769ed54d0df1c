"""Triton kernels of :mod:`graftwork_kernels.gated_low_rank`: the epilogue, and the backward pass of its middle.

Shape suffixes: B rows of the batch, L tokens of a row, T = B L tokens, O outputs, R rank.
"""

# Launching a kernel takes what its signature does not have (num_warps), and constants as numbers.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from graftwork_kernels.tiles import dot

_RANKS = 64


@triton.jit
def _forward(
    base_TO, u_TR, b_OR, gate_BR, y_TO, tokens, outputs, rank, length, scale,
    GATED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile (BLOCK_T x BLOCK_O) of y; those that share tokens are neighbours, so that u comes from the cache."""
    across = tl.cdiv(outputs, BLOCK_O)
    pid = tl.program_id(0)
    t = (pid // across) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = (pid % across) * BLOCK_O + tl.arange(0, BLOCK_O)
    t_in, o_in = t < tokens, o < outputs
    t_wide, o_wide = t.to(tl.int64), o.to(tl.int64)
    acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        r_in = r < rank
        u = tl.load(u_TR + t_wide[:, None] * rank + r[None, :], mask=t_in[:, None] & r_in[None, :], other=0.0)
        if GATED:
            row = t_wide // length
            gate = tl.load(
                gate_BR + row[:, None] * rank + r[None, :], mask=t_in[:, None] & r_in[None, :], other=0.0
            )
            u = (u.to(tl.float32) * gate).to(u_TR.dtype.element_ty)
        b = tl.load(b_OR + o_wide[:, None] * rank + r[None, :], mask=o_in[:, None] & r_in[None, :], other=0.0)
        acc = dot(u, tl.trans(b), acc)
    place = t_wide[:, None] * outputs + o_wide[None, :]
    inside = t_in[:, None] & o_in[None, :]
    base = tl.load(base_TO + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_TO + place, (base + acc * scale).to(y_TO.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_TO, u_TR, b_OR, gate_BR, of_u_TR, gated_TR, of_gate_BTR, outputs, rank, length, tiles, scale,
    GATED: tl.constexpr, NEEDS_GATE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Up to BLOCK_T tokens of one row: h = scale grad B, then h * g, u * g, and this tile's sum of h * u."""
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    at = (pid % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    t_in, r_in = at < length, r < rank
    t = row * length + at
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, outputs, BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        o_in = o < outputs
        grad = tl.load(
            grad_TO + t[:, None] * outputs + o[None, :], mask=t_in[:, None] & o_in[None, :], other=0.0
        )
        b = tl.load(
            b_OR + o.to(tl.int64)[:, None] * rank + r[None, :], mask=o_in[:, None] & r_in[None, :], other=0.0
        )
        # Gradient and factor may differ: a layer in half precision with an adapter in fp32.
        acc = dot(grad.to(b_OR.dtype.element_ty), b, acc)
    acc = acc * scale
    place = t[:, None] * rank + r[None, :]
    inside = t_in[:, None] & r_in[None, :]
    u = tl.load(u_TR + place, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_BR + row * rank + r, mask=r_in, other=0.0)
        if NEEDS_GATE:
            tl.store(of_gate_BTR + pid.to(tl.int64) * rank + r, tl.sum(acc * u, 0), mask=r_in)
        acc = acc * gate[None, :]
        u = u * gate[None, :]
    tl.store(of_u_TR + place, acc.to(of_u_TR.dtype.element_ty), mask=inside)
    tl.store(gated_TR + place, u.to(gated_TR.dtype.element_ty), mask=inside)


def _ranks(u_TR: torch.Tensor) -> int:
    """Return how many ranks a step takes: tiles in fp32 must fit a small GPU's shared memory (99 KiB) too."""
    most = _RANKS // 2 if u_TR.dtype == torch.float32 else _RANKS
    return min(most, max(16, triton.next_power_of_2(u_TR.shape[1])))


def forward(
    base_TO: torch.Tensor, u_TR: torch.Tensor, b_OR: torch.Tensor, gate_BR: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Return base + scale (u * g) B^T in base's dtype; all contiguous, u and B of one dtype, gate in fp32."""
    (tokens, outputs), rank = base_TO.shape, u_TR.shape[1]
    y_TO = torch.empty_like(base_TO)
    if not y_TO.numel():
        return y_TO
    # Fixed, not tuned: the interpreter cannot tune, and the kernel only streams base and y.
    block_t = 16 if tokens <= 16 else 64
    block_o = 64 if u_TR.dtype == torch.float32 else 128
    grid = (triton.cdiv(tokens, block_t) * triton.cdiv(outputs, block_o),)
    length = tokens // len(gate_BR) if gate_BR is not None else tokens
    _forward[grid](
        base_TO, u_TR, b_OR, u_TR if gate_BR is None else gate_BR, y_TO, tokens, outputs, rank, length, scale,
        GATED=gate_BR is not None, BLOCK_T=block_t, BLOCK_O=block_o, BLOCK_R=_ranks(u_TR), num_warps=4,
    )  # fmt: skip
    return y_TO


def backward(
    grad_TO: torch.Tensor,
    u_TR: torch.Tensor,
    b_OR: torch.Tensor,
    gate_BR: torch.Tensor | None,
    scale: float,
    needs_gate: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the gradients of u (T x R) and of the gate (B x R, fp32, where asked for), and u * g in u's dtype.

    Sums over tokens are taken tile by tile and then over tiles in a fixed order, so they are the same every time.
    """
    (tokens, outputs), rank = grad_TO.shape, u_TR.shape[1]
    of_u_TR, gated_TR = torch.empty_like(u_TR), torch.empty_like(u_TR)
    rows = 1 if gate_BR is None else len(gate_BR)
    length = tokens // rows if rows else 0
    # 32 tokens: about two programs per multiprocessor at 8192 tokens, each of which streams its part of grad.
    block_t = 32
    tiles = triton.cdiv(length, block_t)
    wanted = needs_gate and gate_BR is not None
    of_gate_BTR = torch.empty(rows, tiles, rank, dtype=torch.float32, device=u_TR.device) if wanted else None
    if u_TR.numel():
        ranks = _ranks(u_TR)
        _backward[(rows * tiles, triton.cdiv(rank, ranks))](
            grad_TO, u_TR, b_OR, u_TR if gate_BR is None else gate_BR, of_u_TR, gated_TR,
            u_TR if of_gate_BTR is None else of_gate_BTR, outputs, rank, length, tiles, scale,
            GATED=gate_BR is not None, NEEDS_GATE=wanted, BLOCK_T=block_t,
            BLOCK_O=64 if u_TR.dtype == torch.float32 else 128, BLOCK_R=ranks, num_warps=4,
        )  # fmt: skip
    return of_u_TR, gated_TR, None if of_gate_BTR is None else of_gate_BTR.sum(1)
