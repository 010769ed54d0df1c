"""A linear layer of which every token uses the weights of its route: one base, one difference, a bit mask per route.

Legend: T tokens, I inputs, O outputs, K masks, W = ceil(I / 32) words a row; words are those of
:mod:`graftwork_kernels.masked_delta`.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from graftwork_kernels.dispatch import fused
from graftwork_kernels.masked_delta import (
    FLOATS,
    check_operands,
    masked_delta_reference,
    plain,
    words_of,
)

BASE = -1
"""Route id of tokens that use the base's weights alone."""


def masked_delta_linear_reference(
    x: torch.Tensor,
    weight_OI: torch.Tensor,
    delta_OI: torch.Tensor,
    words_KOW: torch.Tensor,
    routes: torch.Tensor,
    scales_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute every token with every route and choose; the definition. See :func:`masked_delta_linear`."""
    out = linear(x, weight_OI.to(x.dtype))
    for route, words_OW in enumerate(words_KOW):
        scale = 1.0 if scales_K is None else float(scales_K[route])
        rebuilt_OI = masked_delta_reference(weight_OI, delta_OI, words_OW, scale).to(x.dtype)
        out = torch.where((routes == route).unsqueeze(-1), linear(x, rebuilt_OI), out)
    return out


def masked_delta_linear(
    x: torch.Tensor,
    weight_OI: torch.Tensor,
    delta_OI: torch.Tensor,
    words_KOW: torch.Tensor,
    routes: torch.Tensor,
    scales_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x_t W_r(t)^T`` with ``W_k = dtype(f32(W0) + scale_k bit_k f32(U))``, shape of ``routes`` and O.

    No ``W_k`` is kept: on a GPU none exists outside of registers, else one at a time. Products are accumulated in
    float32. Differentiable in ``x`` alone: masks belong to the values that they were made for. Under autocast ``x`` and
    the rebuilt weights are cast as those of a plain linear are. MMER's routing (its spec, step 3); a bias is the
    caller's to add.

    Args:
        x: ... x I, in the dtype of ``weight_OI`` (float32, bfloat16, float16 or float64).
        weight_OI: the base's weight.
        delta_OI: what masks choose from, of any of these dtypes.
        words_KOW: int32, a packed mask per route.
        routes: whole numbers, one per token of ``x``: from 0 to K - 1, or -1 for the base. On a GPU they are not
            checked.
        scales_K: float32; 1 where not given.

    Raises:
        ValueError: shapes or dtypes that do not belong together, a route that is none, a weight, difference or scale
            that asks for gradients.
    """
    check_operands(weight_OI, delta_OI)
    outputs, inputs = weight_OI.shape
    if words_KOW.dtype != torch.int32 or tuple(words_KOW.shape[1:]) != (outputs, words_of(inputs)):
        raise ValueError(
            f"masks of {outputs} x {inputs} weights are int32, K x {outputs} x {words_of(inputs)}, not "
            f"{tuple(words_KOW.shape)} of {words_KOW.dtype}"
        )
    if x.shape[:-1] != routes.shape or x.ndim < 1 or x.shape[-1] != inputs:
        raise ValueError(
            f"tokens are ... x {inputs} with a route for each, not {tuple(x.shape)} with routes {tuple(routes.shape)}"
        )
    if routes.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"routes are whole numbers (int64 or int32), not {routes.dtype}")
    if scales_K is not None and tuple(scales_K.shape) != (words_KOW.shape[0],):
        raise ValueError(f"there are {words_KOW.shape[0]} masks, and scales are {tuple(scales_K.shape)}")
    if any(one is not None and one.requires_grad for one in (weight_OI, delta_OI, scales_K)):
        raise ValueError("weight, difference and scales are frozen, and one of them asks for gradients")
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    elif x.dtype != weight_OI.dtype or x.dtype not in FLOATS:
        raise ValueError(f"tokens are {x.dtype} and the weight is {weight_OI.dtype}; they are to be alike")
    scales = None if scales_K is None else scales_K.float()
    flat = x.reshape(-1, inputs)
    out = _linear(flat, weight_OI, delta_OI, words_KOW, routes.reshape(-1), scales)
    return out.view(*x.shape[:-1], outputs)


@torch.library.custom_op("graftwork::masked_delta_linear", mutates_args=())
def _linear(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    delta_OI: torch.Tensor,
    words_KOW: torch.Tensor,
    routes_T: torch.Tensor,
    scales_K: torch.Tensor | None,
) -> torch.Tensor:
    return _routed(x_TI, weight_OI, delta_OI, words_KOW, routes_T, scales_K, transposed=False)


@_linear.register_fake
def _(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    delta_OI: torch.Tensor,
    words_KOW: torch.Tensor,
    routes_T: torch.Tensor,
    scales_K: torch.Tensor | None,
) -> torch.Tensor:
    return x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0])


@torch.library.custom_op("graftwork::masked_delta_linear_backward", mutates_args=())
def _linear_backward(
    grad_TO: torch.Tensor,
    weight_OI: torch.Tensor,
    delta_OI: torch.Tensor,
    words_KOW: torch.Tensor,
    routes_T: torch.Tensor,
    scales_K: torch.Tensor | None,
) -> torch.Tensor:
    """Return ``y_t W_r(t)``, the gradient of x."""
    return _routed(grad_TO, weight_OI, delta_OI, words_KOW, routes_T, scales_K, transposed=True)


@_linear_backward.register_fake
def _(
    grad_TO: torch.Tensor,
    weight_OI: torch.Tensor,
    delta_OI: torch.Tensor,
    words_KOW: torch.Tensor,
    routes_T: torch.Tensor,
    scales_K: torch.Tensor | None,
) -> torch.Tensor:
    return grad_TO.new_empty(grad_TO.shape[0], weight_OI.shape[1])


def _save(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: object, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    found = None
    if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
        found = _linear_backward(grad_TO, *ctx.saved_tensors)  # type: ignore[attr-defined]
    return found, None, None, None, None, None


_linear.register_autograd(_backward, setup_context=_save)


def _backward_twice(ctx: object, grad_TI: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    found = _linear(grad_TI, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
    return found, None, None, None, None, None


_linear_backward.register_autograd(_backward_twice, setup_context=_save)


def _routed(
    rows_TX: torch.Tensor,
    weight_OI: torch.Tensor,
    delta_OI: torch.Tensor,
    words_KOW: torch.Tensor,
    routes_T: torch.Tensor,
    scales_K: torch.Tensor | None,
    *,
    transposed: bool,
) -> torch.Tensor:
    """Multiply every row by its route's weights, or by their transpose."""
    doubles = torch.float64 in (rows_TX.dtype, weight_OI.dtype, delta_OI.dtype)
    if fused(rows_TX, weight_OI, delta_OI, words_KOW, routes_T) and not doubles:
        from graftwork_kernels.masked_delta_linear_triton import routed

        return routed(
            rows_TX.contiguous(),
            weight_OI.contiguous(),
            delta_OI.contiguous(),
            words_KOW.contiguous(),
            routes_T,
            scales_K,
            transposed=transposed,
        )
    return _by_route(rows_TX, weight_OI, delta_OI, words_KOW, routes_T, scales_K, transposed)


def _by_route(
    rows_TX: torch.Tensor,
    weight_OI: torch.Tensor,
    delta_OI: torch.Tensor,
    words_KOW: torch.Tensor,
    routes_T: torch.Tensor,
    scales_K: torch.Tensor | None,
    transposed: bool,
) -> torch.Tensor:
    """Rebuild the weights of one route after the other, each for its own tokens."""
    found = rows_TX.new_empty(rows_TX.shape[0], weight_OI.shape[1 if transposed else 0])
    used = routes_T.unique().tolist()
    for route in used:
        if not BASE <= route < len(words_KOW):
            raise ValueError(
                f"there is no route {route}; routes go from {BASE} (base) to {len(words_KOW) - 1}"
            )
        rebuilt_OI = weight_OI
        if route != BASE:
            scale = 1.0 if scales_K is None else float(scales_K[route])
            rebuilt_OI = plain(weight_OI, delta_OI, words_KOW[route], scale)
        rebuilt_OI = rebuilt_OI.to(rows_TX.dtype)
        factor = rebuilt_OI.t() if transposed else rebuilt_OI
        if len(used) == 1:
            # A result of an op is never one of its inputs; a product is new.
            return linear(rows_TX, factor)
        mine = (routes_T == route).nonzero().squeeze(1)
        found[mine] = linear(rows_TX[mine], factor)
    return found
