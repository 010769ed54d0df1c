"""A frozen layer's output plus a gated low-rank product, and nothing of size tokens x outputs kept for it.

    y = base + scale * ((x A^T) * g) B^T                         g: one number per row of the batch and rank

With branches stacked, A = [A_s; A_p] and B = [B_s, B_p], and a gate per branch repeated over its ranks this is
SpaRTA's layer (spec, equation 1); without a gate it is LoRA's. The kernel is an epilogue: it reads the base output
once, adds the product in fp32 and writes once, where PyTorch makes three passes. As for LoRA, x and u = x A^T are what
the backward pass keeps. The gradient of the gate is summed over a row's tokens in fp32.

Shape suffixes: B rows of the batch, L tokens of a row (any number of dimensions), T = B L, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from graftwork_kernels import dispatch

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gated_low_rank_reference(
    base_BLO: torch.Tensor,
    x_BLI: torch.Tensor,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    gate_BR: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Return base + scale ((x A^T) * g) B^T, step by step: the definition, in any dtype."""
    u_BLR = F.linear(x_BLI, a_RI)
    if gate_BR is not None:
        u_BLR = u_BLR * _over_tokens(gate_BR, u_BLR).to(u_BLR.dtype)
    return base_BLO + F.linear(u_BLR, b_OR) * scale


def gated_low_rank(
    base_BLO: torch.Tensor,
    x_BLI: torch.Tensor,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    gate_BR: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Return base + scale ((x A^T) * g) B^T (B x L x O) in base's dtype, differentiable in every tensor.

    The product is taken in the dtype of A and B, or in autocast's. Kernels run where all tensors are on a GPU and in
    fp32, bf16 or fp16.

    Args:
        base_BLO: output of the frozen layer; not written to.
        x_BLI: input of the layer, with whatever dropout the adapter has.
        a_RI: stacked down projections.
        b_OR: stacked up projections.
        gate_BR: gates per row of the batch and rank; 1 where None.
        scale: constant factor.

    Raises:
        ValueError: shapes do not fit together, or A and B differ in dtype.
    """
    _check(base_BLO, x_BLI, a_RI, b_OR, gate_BR)
    kind = x_BLI.device.type
    exact = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a_RI.dtype
    u_BLR = F.linear(x_BLI.to(exact), a_RI.to(exact))
    b_OR = b_OR.to(exact)
    given = [base_BLO, u_BLR, b_OR, *([] if gate_BR is None else [gate_BR])]
    if dispatch.fused(*given) and all(tensor.dtype in _KERNEL_DTYPES for tensor in given):
        gate = None if gate_BR is None else gate_BR.float()
        return torch.ops.graftwork.gated_low_rank(base_BLO, u_BLR, b_OR, gate, scale)
    if gate_BR is not None:
        # In fp32 on the small side, so that the sum that is the gate's gradient is.
        wide = torch.promote_types(exact, torch.float32)
        u_BLR = (u_BLR.to(wide) * _over_tokens(gate_BR, u_BLR).to(wide)).to(exact)
        if exact == base_BLO.dtype:
            # One pass over base and y. Without a gate the three of PEFT's LoRA, so that it is LoRA bit for bit.
            y_TO = torch.addmm(base_BLO.flatten(0, -2), u_BLR.flatten(0, -2), b_OR.T, alpha=scale)
            return y_TO.view(base_BLO.shape)
    return (base_BLO + F.linear(u_BLR, b_OR) * scale).to(base_BLO.dtype)


def _over_tokens(gate_BR: torch.Tensor, u_BLR: torch.Tensor) -> torch.Tensor:
    """Return the gate with as many dimensions as u."""
    return gate_BR.reshape(len(gate_BR), *[1] * (u_BLR.dim() - 2), gate_BR.shape[1])


def _check(
    base: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, gate: torch.Tensor | None
) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(f"A and B must be (rank x inputs) and (outputs x rank), not {_of(a)} and {_of(b)}")
    if a.dtype != b.dtype:
        raise ValueError(f"A is {a.dtype} and B is {b.dtype}; they must be of one dtype")
    if (
        x.dim() < 2
        or x.shape[:-1] != base.shape[:-1]
        or (x.shape[-1], base.shape[-1]) != (a.shape[1], len(b))
    ):
        raise ValueError(f"input {_of(x)} and output {_of(base)} do not fit A {_of(a)} and B {_of(b)}")
    if gate is not None and gate.shape != (len(x), len(a)):
        raise ValueError(f"the gate must be (rows x rank) = ({len(x)}, {len(a)}), not {_of(gate)}")


def _of(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


if dispatch.HAS_TRITON:
    from graftwork_kernels import gated_low_rank_triton as kernels
    from graftwork_kernels.region_update_triton import mixed_product

    @torch.library.custom_op("graftwork::gated_low_rank", mutates_args=())
    def _op(
        base: torch.Tensor, u: torch.Tensor, b: torch.Tensor, gate: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """The epilogue: base + scale (u * g) B^T; u (B x L x R) and B in one dtype, the gate in fp32."""
        flat = base.contiguous().flatten(0, -2)
        u_TR = u.contiguous().flatten(0, -2)
        y_TO = kernels.forward(flat, u_TR, b.contiguous(), None if gate is None else gate.contiguous(), scale)
        return y_TO.view(base.shape)

    @_op.register_fake
    def _(
        base: torch.Tensor, u: torch.Tensor, b: torch.Tensor, gate: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        return base.new_empty(base.shape)

    @torch.library.custom_op("graftwork::gated_low_rank_backward", mutates_args=())
    def _backward_op(
        grad: torch.Tensor,
        u: torch.Tensor,
        b: torch.Tensor,
        gate: torch.Tensor | None,
        scale: float,
        needs_gate: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of u, B and the gate (empty where not asked for)."""
        grad_TO = grad.contiguous().flatten(0, -2)
        of_u, gated_TR, of_gate = kernels.backward(
            grad_TO,
            u.contiguous().flatten(0, -2),
            b.contiguous(),
            None if gate is None else gate.contiguous(),
            scale,
            needs_gate,
        )
        of_b = mixed_product(grad_TO.T, gated_TR, b.dtype) * scale
        return of_u.view(u.shape), of_b, b.new_empty(0, dtype=torch.float32) if of_gate is None else of_gate

    @_backward_op.register_fake
    def _(
        grad: torch.Tensor,
        u: torch.Tensor,
        b: torch.Tensor,
        gate: torch.Tensor | None,
        scale: float,
        needs_gate: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wanted = needs_gate and gate is not None
        shape = gate.shape if gate is not None and wanted else (0,)
        return u.new_empty(u.shape), b.new_empty(b.shape), b.new_empty(shape, dtype=torch.float32)

    def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, u, b, gate, ctx.scale = inputs
        ctx.save_for_backward(u, b, gate)

    def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        u, b, gate = ctx.saved_tensors
        needs_base, needs_u, needs_b, needs_gate, _ = ctx.needs_input_grad
        of_u = of_b = of_gate = None
        if needs_u or needs_b or needs_gate:
            of_u, of_b, of_gate = torch.ops.graftwork.gated_low_rank_backward(
                grad, u, b, gate, ctx.scale, needs_gate
            )
        return (
            grad if needs_base else None,
            of_u if needs_u else None,
            of_b if needs_b else None,
            of_gate if needs_gate else None,
            None,
        )

    _op.register_autograd(_gradients, setup_context=_keep)
