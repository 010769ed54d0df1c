"""A product with a weight that stays packed: four or two bits, dequantised inside.

With codes q (n x k), scales (n x groups) and zero points z (n x groups, or none) of groups of k/groups columns::

    W = (q - z) scale        y = ((x * into) W^T) * out + (x right^T) left^T + bias

``into`` (k) and ``out`` (n) are diagonals, ``left`` (n x r) and ``right`` (r x k) a low-rank correction of the plain
input; all are optional. Codes and zero points are packed as compressed-tensors' format pack-quantized stores them
(``weight_packed``, ``weight_zero_point``), so tensors of a checkpoint go in as they are.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from graftwork_kernels.dispatch import HAS_TRITON, fused

BITS = (2, 4)


def packed_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    bits: int,
    into: Tensor | None = None,
    out: Tensor | None = None,
    correction: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return y (..., n) of the module, in the dtype of ``x`` (under autocast, in autocast's), with gradients to ``x``.

    Sums are in float32; weights, and inputs times ``into``, are rounded to the dtype of ``x`` before.

    Args:
        x: (..., k), any floating dtype.
        packed: (n, ceil(k bits / 32)) int32.
        scale: (n, groups), floating.
        zero: (ceil(n bits / 32), groups) int32, packed along the outputs; None: levels lie around zero.
        bits: 2 or 4.
        into, out: (k) and (n).
        correction: ``left`` (n, r) and ``right`` (r, k).
        bias: (n).

    Raises:
        ValueError: sizes that do not fit, other bits, or a gradient asked for by anything but ``x``.
    """
    others = (scale, into, out, bias, *(correction or ()))
    _check(x, packed, scale, zero, bits, into, out, correction, bias)
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in others):
        raise ValueError("a packed product has gradients to its input only; detach the rest")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    n, k = packed.shape[0], x.shape[-1]
    empty = not (x.numel() and n)
    if x.dtype == torch.float64 or empty or not fused(x, packed):
        return packed_matmul_reference(
            x, packed, scale, zero, bits=bits, into=into, out=out, correction=correction, bias=bias
        )
    left, right = (None, None) if correction is None or not correction[0].shape[1] else correction
    return torch.ops.graftwork.packed_matmul(
        x.reshape(-1, k), packed, scale, zero, into, out, left, right, bias, bits
    ).reshape(*x.shape[:-1], n)


def packed_matmul_reference(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None = None, *, bits: int, into: Tensor | None = None,
    out: Tensor | None = None, correction: tuple[Tensor, Tensor] | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return what :func:`packed_matmul` returns, in plain PyTorch and the dtype of ``x``; the definition in float64."""
    with torch.no_grad():
        weight = unpacked(packed, scale, zero, bits=bits, columns=x.shape[-1], dtype=x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        y = torch.nn.functional.linear(x if into is None else x * into.to(x.dtype), weight)
        if out is not None:
            y = y * out.to(x.dtype)
        if correction is not None:
            left, right = (factor.to(x.dtype) for factor in correction)
            y = y + x @ right.mT @ left.mT
        return y if bias is None else y + bias.to(x.dtype)


def unpacked(
    packed: Tensor, scale: Tensor, zero: Tensor | None = None, *, bits: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return the weight (n x columns) that is packed, in ``dtype``, computed in float32 (float64 for float64)."""
    wide = torch.promote_types(dtype, torch.float32)
    codes = _codes(packed, bits)[:, :columns].to(wide).unflatten(1, (scale.shape[1], -1))
    if zero is None:
        codes = codes.sub_(1 << (bits - 1))
    else:
        codes = codes.sub_(_codes(zero.t(), bits)[:, : len(packed)].t().to(wide).unsqueeze(-1))
    return codes.mul_(scale.to(wide).unsqueeze(-1)).flatten(1).to(dtype)


def _codes(words: Tensor, bits: int) -> Tensor:
    """Return the unsigned codes (rows x values; uint8) of words (rows x words): bytes are split, not words."""
    parts = words.contiguous().view(torch.uint8)
    if sys.byteorder == "big" and not words.is_cuda:
        parts = parts.unflatten(1, (-1, 4)).flip(-1).flatten(1)
    return torch.stack([(parts >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1).flatten(1)


def _check(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, into: Tensor | None,
    out: Tensor | None, correction: tuple[Tensor, Tensor] | None, bias: Tensor | None,
) -> None:  # fmt: skip
    if bits not in BITS:
        raise ValueError(f"weights of {bits} bits are not multiplied packed; 2 and 4 are")
    k = x.shape[-1] if x.ndim else 0
    if packed.dtype != torch.int32 or packed.ndim != 2 or packed.shape[1] != -(-k * bits // 32) or not k:
        raise ValueError(f"{packed.dtype} words {tuple(packed.shape)} for inputs of {k} and {bits} bits")
    n = packed.shape[0]
    if scale.ndim != 2 or scale.shape[0] != n or not scale.shape[1] or k % scale.shape[1]:
        raise ValueError(f"scales {tuple(scale.shape)} for a weight of {n} x {k}")
    wanted = (-(-n * bits // 32), scale.shape[1])
    if zero is not None and (zero.dtype != torch.int32 or tuple(zero.shape) != wanted):
        raise ValueError(f"zero points {tuple(zero.shape)}, {zero.dtype}; int32 {wanted} is wanted")
    for name, part, size in (("into", into, k), ("out", out, n), ("bias", bias, n)):
        if part is not None and tuple(part.shape) != (size,):
            raise ValueError(f"{name} has the shape {tuple(part.shape)}, not ({size},)")
    if correction is not None:
        left, right = correction
        if left.ndim != 2 or tuple(left.shape) != (n, right.shape[0]) or tuple(right.shape[1:]) != (k,):
            raise ValueError(f"correction {tuple(left.shape)} x {tuple(right.shape)} of a {n} x {k}")


if HAS_TRITON:
    from graftwork_kernels import packed_matmul_triton as kernels

    _PARTS = (
        "Tensor packed, Tensor scale, Tensor? zero, Tensor? into, Tensor? out, Tensor? left, Tensor? right"
    )

    @torch.library.custom_op(
        "graftwork::packed_matmul",
        mutates_args=(),
        schema=f"(Tensor x, {_PARTS}, Tensor? bias, int bits) -> Tensor",
    )
    def _forward(
        x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, into: Tensor | None, out: Tensor | None,
        left: Tensor | None, right: Tensor | None, bias: Tensor | None, bits: int,
    ) -> Tensor:  # fmt: skip
        y = x.new_empty(len(x), len(packed))
        low = None if right is None else (x @ right.to(x.dtype).t()).contiguous()
        kernels.launch_forward(
            x.contiguous(), packed.contiguous(), scale.contiguous(), _whole(zero), _whole(into), _whole(out), low,
            _whole(left, x.dtype), _whole(bias), y, bits,
        )  # fmt: skip
        return y

    @_forward.register_fake
    def _(x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(x.shape[0], packed.shape[0])

    @torch.library.custom_op(
        "graftwork::packed_matmul_backward",
        mutates_args=(),
        schema=f"(Tensor grad, {_PARTS}, int bits, int columns) -> Tensor",
    )
    def _backward(
        grad: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, into: Tensor | None, out: Tensor | None,
        left: Tensor | None, right: Tensor | None, bits: int, columns: int,
    ) -> Tensor:  # fmt: skip
        dx = grad.new_empty(len(grad), columns)
        low = None if left is None else (grad @ left.to(grad.dtype)).contiguous()
        kernels.launch_backward(
            grad.contiguous(), packed.contiguous(), scale.contiguous(), _whole(zero), _whole(into), _whole(out), low,
            _whole(right, grad.dtype), dx, bits,
        )  # fmt: skip
        return dx

    @_backward.register_fake
    def _(grad: Tensor, *rest: Any) -> Tensor:
        return grad.new_empty(grad.shape[0], rest[-1])

    def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *parts, _, ctx.bits = inputs
        ctx.columns = x.shape[1]
        ctx.save_for_backward(*parts)

    def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx = torch.ops.graftwork.packed_matmul_backward(grad, *ctx.saved_tensors, ctx.bits, ctx.columns)
        return dx, *[None] * 9

    _forward.register_autograd(_gradient, setup_context=_save)


def _whole(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()
