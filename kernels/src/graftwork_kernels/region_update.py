"""A change of a few neurons' weights, kept out of a protected subspace, added to a layer's output in place.

    F = Theta - (Theta U) U^T,   or (Theta V) V^T                                 fold_rows
    y[..., rows] += x F^T                                                         region_update_

F (neurons x inputs) is formed once per pass, as two thin products in Theta's own precision, which is what keeps it out
of the subspace (PaRSP's equation 4; section "Cost and kernels"). The kernel multiplies and adds straight into the
rows' places in y: beyond y, x and F nothing is read or written. x in bf16 is multiplied with F in fp32 exactly, in
three products of 16 bits, and x is never copied to fp32.

Shape suffixes: T tokens (any number of dimensions), I inputs, O outputs, C changed neurons, K width of the basis.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from graftwork_kernels import dispatch

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fold_rows(theta_CI: torch.Tensor, basis_IK: torch.Tensor, complement: bool = False) -> torch.Tensor:
    """Return Theta P (C x I): Theta - (Theta U) U^T, or with ``complement`` (Theta V) V^T, the shorter of both.

    Args:
        theta_CI: parameters of the rows.
        basis_IK: orthonormal columns: U spans what is protected, V what is free.
        complement: whether the basis is V.

    Raises:
        ValueError: Theta's width is not the basis'.
    """
    if theta_CI.dim() != 2 or basis_IK.dim() != 2 or theta_CI.shape[1] != len(basis_IK):
        raise ValueError(
            f"a basis of shape {tuple(basis_IK.shape)} does not fit parameters of shape {tuple(theta_CI.shape)}"
        )
    inside_CK = theta_CI @ basis_IK
    return inside_CK @ basis_IK.T if complement else torch.addmm(theta_CI, inside_CK, basis_IK.T, alpha=-1)


def region_update_reference(
    y_TO: torch.Tensor, x_TI: torch.Tensor, change_CI: torch.Tensor, rows_C: torch.Tensor
) -> torch.Tensor:
    """Return y with x F^T added to the columns ``rows_C``, in a new tensor: the definition, in any dtype."""
    product_TC = F.linear(x_TI.to(change_CI.dtype), change_CI)
    return y_TO.index_add(-1, rows_C, product_TC.to(y_TO.dtype))


def region_update_(
    y_TO: torch.Tensor, x_TI: torch.Tensor, change_CI: torch.Tensor, rows_C: torch.Tensor
) -> torch.Tensor:
    """Add x F^T to the columns ``rows_C`` of y (T x O) in place, and return y. Differentiable in y, x and F.

    So y must be a tensor that nobody needs as it was: the output of a linear layer, for one. The product is taken in
    F's precision, or in autocast's. Kernels run where all is on a GPU and in fp32, bf16 or fp16.

    Args:
        y_TO: output of the layer.
        x_TI: input of the layer.
        change_CI: F, how the weights of the changed neurons differ.
        rows_C: int32 or int64; which neurons those are, each once. Ascending is faster.

    Raises:
        ValueError: shapes do not fit together.
    """
    if (
        change_CI.dim() != 2
        or x_TI.dim() < 2
        or rows_C.shape != change_CI.shape[:1]
        or x_TI.shape[:-1] != y_TO.shape[:-1]
        or x_TI.shape[-1] != change_CI.shape[1]
    ):
        raise ValueError(
            f"input {tuple(x_TI.shape)}, output {tuple(y_TO.shape)}, a change {tuple(change_CI.shape)} and rows "
            f"{tuple(rows_C.shape)} do not fit together"
        )
    kind = x_TI.device.type
    if torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        x_TI, change_CI = x_TI.to(low), change_CI.to(low)
    given = (y_TO, x_TI, change_CI)
    # The kernel takes y's columns side by side; linear layers give them so.
    if (
        dispatch.fused(*given, rows_C)
        and y_TO.is_contiguous()
        and all(t.dtype in _KERNEL_DTYPES for t in given)
    ):
        return _InPlace.apply(y_TO, x_TI, change_CI, rows_C)
    product_TC = F.linear(x_TI.to(change_CI.dtype), change_CI).to(y_TO.dtype)
    return y_TO.index_add_(-1, rows_C, product_TC)


class _InPlace(torch.autograd.Function):
    """The kernel; with g the gradient of the changed columns, F's is g^T x and x's is g F. y's own passes through."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, change: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, change, rows)
        torch.ops.graftwork.region_update_(y, x, change, rows)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        x, change, rows = ctx.saved_tensors
        needs_y, needs_x, needs_change, _ = ctx.needs_input_grad
        of_x = of_change = None
        if needs_x or needs_change:
            g_TC = grad.index_select(-1, rows)
            if needs_x:
                of_x = torch.ops.graftwork.mixed_product(g_TC.flatten(0, -2), change, x.dtype).view(x.shape)
            if needs_change:
                of_change = torch.ops.graftwork.mixed_product(
                    g_TC.flatten(0, -2).T, x.flatten(0, -2), change.dtype
                )
        return grad if needs_y else None, of_x, of_change, None


if dispatch.HAS_TRITON:
    from graftwork_kernels import region_update_triton as kernels

    @torch.library.custom_op("graftwork::region_update_", mutates_args=("y",))
    def _update(y: torch.Tensor, x: torch.Tensor, change: torch.Tensor, rows: torch.Tensor) -> None:
        """Add x F^T to columns of the contiguous y."""
        kernels.product(x.flatten(0, -2), change.T, y.flatten(0, -2), rows.contiguous())

    @_update.register_fake
    def _(y: torch.Tensor, x: torch.Tensor, change: torch.Tensor, rows: torch.Tensor) -> None:
        return None

    @torch.library.custom_op("graftwork::mixed_product", mutates_args=())
    def _mixed_product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return A B in ``dtype``, for factors of any two dtypes, summed in fp32."""
        return kernels.mixed_product(a, b, dtype)

    @_mixed_product.register_fake
    def _(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
