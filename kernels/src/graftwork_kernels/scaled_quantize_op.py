"""The operators behind :mod:`graftwork_kernels.scaled_quantize`, for torch.compile and autograd; there is Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graftwork_kernels import scaled_quantize_triton as kernels

_HOW = "int bits, int block, int? group, bool symmetric, bool half_range, float ratio, float floor"


@torch.library.custom_op(
    "graftwork::scaled_quantize",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? diagonal, Tensor? core, {_HOW}, bool packed) -> (Tensor, Tensor, Tensor)",
)
def _quantize(
    x: Tensor, diagonal: Tensor | None, core: Tensor | None, bits: int, block: int, group: int | None,
    symmetric: bool, half_range: bool, ratio: float, floor: float, packed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    codes, scale, zero = _empty(x, bits, group, symmetric, packed)
    rows, plan, group = _rows(x, block, core, group)
    kernels.launch_quantize(
        rows, _flat(diagonal), core, None, None, codes, scale, zero, plan, bits, group, symmetric, half_range,
        ratio, floor, 32 // bits if packed else 1,
    )  # fmt: skip
    return codes, scale, zero


@_quantize.register_fake
def _(
    x: Tensor, diagonal: Tensor | None, core: Tensor | None, bits: int, block: int, group: int | None,
    symmetric: bool, half_range: bool, ratio: float, floor: float, packed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty(x, bits, group, symmetric, packed)


@torch.library.custom_op(
    "graftwork::scaled_fake_quantize",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? diagonal, Tensor? core, Tensor? high, Tensor? low, {_HOW}, ScalarType dtype) "
    "-> Tensor",
)
def _fake_quantize(
    x: Tensor, diagonal: Tensor | None, core: Tensor | None, high: Tensor | None, low: Tensor | None, bits: int,
    block: int, group: int | None, symmetric: bool, half_range: bool, ratio: float, floor: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows, plan, group = _rows(x, block, core, group)
    kernels.launch_quantize(
        rows, _flat(diagonal), core, high, low, out, None, None, plan, bits, group, symmetric, half_range, ratio,
        floor, 1,
    )  # fmt: skip
    return out


@_fake_quantize.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty(x.shape, dtype=rest[-1], device=x.device)


@torch.library.custom_op(
    "graftwork::scaled_fake_quantize_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor x, Tensor? diagonal, Tensor? core, Tensor? high, Tensor? low, {_HOW}) "
    "-> (Tensor, Tensor, Tensor)",
)
def _fake_quantize_backward(
    grad: Tensor, x: Tensor, diagonal: Tensor | None, core: Tensor | None, high: Tensor | None,
    low: Tensor | None, bits: int, block: int, group: int | None, symmetric: bool, half_range: bool, ratio: float,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, grad_high, grad_low = _empty_gradients(x, high, group)
    rows, plan, group = _rows(x, block, core, group)
    kernels.launch_backward(
        grad.reshape(rows.shape).contiguous(), rows, _flat(diagonal), core, high, low, out, grad_high, grad_low,
        plan, bits, group, symmetric, half_range, ratio, floor,
    )  # fmt: skip
    return out, grad_high, grad_low


@_fake_quantize_backward.register_fake
def _(
    grad: Tensor, x: Tensor, diagonal: Tensor | None, core: Tensor | None, high: Tensor | None,
    low: Tensor | None, bits: int, block: int, group: int | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_gradients(x, high, group)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.bits, ctx.block, ctx.group, ctx.symmetric, ctx.half_range, ctx.ratio, ctx.floor, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, diagonal, core, high, low = ctx.saved_tensors
    scaled, grad_high, grad_low = torch.ops.graftwork.scaled_fake_quantize_backward(
        grad, x, diagonal, core, high, low, ctx.bits, ctx.block, ctx.group, ctx.symmetric, ctx.half_range,
        ctx.ratio, ctx.floor,
    )  # fmt: skip
    needs = ctx.needs_input_grad
    of_x = of_diagonal = of_high = of_low = None
    if needs[0]:
        of_x = (scaled if diagonal is None else scaled * diagonal).to(x.dtype)
    if needs[1] and diagonal is not None:
        of_diagonal = (scaled * x).reshape(-1, x.shape[-1]).sum(0).to(diagonal.dtype)
    if needs[3]:
        of_high = _summed(grad_high, high)
    if needs[4]:
        of_low = _summed(grad_low, low)
    return of_x, of_diagonal, None, of_high, of_low, *[None] * 8


_fake_quantize.register_autograd(_backward, setup_context=_save)


def _summed(grad: Tensor, share: Tensor) -> Tensor:
    return (grad if share.numel() > 1 else grad.sum()).reshape(share.shape)


def _flat(diagonal: Tensor | None) -> Tensor | None:
    return None if diagonal is None else diagonal.contiguous()


def _rows(x: Tensor, block: int, core: Tensor | None, group: int | None) -> tuple[Tensor, Any, int | None]:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    # One group is the row, which need not be a power of two.
    group = None if group == rows.shape[1] else group
    plan = kernels.plan(rows.shape[1], block, 1 if core is None else core.shape[0], group)
    assert plan is not None
    return rows, plan, group


def _empty(
    x: Tensor, bits: int, group: int | None, symmetric: bool, packed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    front, d = x.shape[:-1], x.shape[-1]
    slices = (*front, d // (group or d))
    return (
        x.new_empty((*front, -(-d * bits // 32)), dtype=torch.int32)
        if packed
        else x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(slices, dtype=torch.float32),
        x.new_empty((0,) if symmetric else slices, dtype=torch.int8),
    )


def _empty_gradients(x: Tensor, high: Tensor | None, group: int | None) -> tuple[Tensor, Tensor, Tensor]:
    d = x.shape[-1]
    slices = (0,) if high is None else (*x.shape[:-1], d // (group or d))
    return (
        torch.empty(x.shape, dtype=torch.float32, device=x.device),
        x.new_empty(slices, dtype=torch.float32),
        x.new_empty(slices, dtype=torch.float32),
    )
