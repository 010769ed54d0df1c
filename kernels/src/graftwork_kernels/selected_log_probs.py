"""Log-probabilities of chosen tokens, and entropies, from hidden states and a head's weight, without the logits.

With z_n = W h_n + b (Z for its log-sum-exp, p_n = softmax z_n) this is the definition of softmax::

    log p_n[y_n] = z_n[y_n] - Z_n            H_n = Z_n - sum_v p_n[v] z_n[v]          (nats)
    d log p_n[y_n] / d z_n[v] = 1[v = y_n] - p_n[v]
    d H_n          / d z_n[v] = -p_n[v] (log p_n[v] + H_n)

The vocabulary is walked through in blocks with a running maximum and sum, as in an online softmax; a block's logits
are gone when the next one comes. Where only the hidden states learn (a frozen head), the direction of their gradient,
W[y_n] - sum_v p_n[v] W[v], does not depend on the gradient that arrives. On CPU it is summed up block by block
in the forward pass, like the values in attention, and the backward pass has no product left: two in all instead of
three (ours). Else the backward pass makes the logits again.

Shapes: N tokens, D width of the hidden states, V words; x_ND is N x D.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch.nn import functional as F

from graftwork_kernels import dispatch
from graftwork_kernels import selected_log_probs_blocks as blocks


def selected_log_probs_reference(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities and entropies (N each) from the logits, in the dtype of the inputs."""
    table_NV = F.log_softmax(F.linear(hidden_ND, weight_VD, bias_V), -1)
    surprise_NV = torch.where(table_NV == -torch.inf, 0.0, table_NV.exp() * table_NV)
    return table_NV.gather(1, labels_N[:, None]).squeeze(1), -surprise_NV.sum(1)


@overload
def selected_log_probs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    *,
    entropies: Literal[False] = False,
) -> torch.Tensor: ...


@overload
def selected_log_probs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    *,
    entropies: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def selected_log_probs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    *,
    entropies: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return log softmax(hidden weight^T + bias)[n, labels[n]], (N) in float32 (float64 for float64 inputs).

    With ``entropies`` also those of the N distributions, in nats. Gradients reach ``hidden``, ``weight`` and
    ``bias`` through both. ``labels`` are integers from 0 to V - 1; others give NaN, or an IndexError on CPU.

    Products are taken in the dtype of autocast, else in that of the inputs; sums and softmax are in float32. In
    half precision on CPU each logit is rounded, as by the model's own head; a kernel does not round it.

    Raises:
        ValueError: shapes that do not fit, no words, labels that are no integers, or hidden states or a weight that
            are not of a floating dtype.
    """
    _check(hidden_ND, weight_VD, labels_N, bias_V)
    device = hidden_ND.device.type
    dtype = torch.promote_types(hidden_ND.dtype, weight_VD.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    head_learns = weight_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
    direction = (
        torch.is_grad_enabled()
        and hidden_ND.requires_grad
        and not head_learns
        and not entropies
        and not _fused(hidden_ND, weight_VD)
    )
    selected_N, entropy_N, _, _ = _forward(hidden_ND, weight_VD, labels_N, bias_V, entropies, direction)
    return (selected_N, entropy_N) if entropies else selected_N


def _check(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None
) -> None:
    shapes = f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2 or labels.dim() != 1:
        raise ValueError(f"hidden states, weight and labels are N x D, V x D and N, not {shapes}")
    if hidden.shape[1] != weight.shape[1] or len(hidden) != len(labels) or not len(weight):
        raise ValueError(f"hidden states (N x D), weight (V x D, V > 0) and labels (N) do not fit: {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"the bias has a number per row of the weight, {len(weight)}, not {tuple(bias.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels are integers, not {labels.dtype}")
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"hidden states and weight are floating, not {hidden.dtype} and {weight.dtype}")


def _fused(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    return hidden.dtype != torch.float64 and dispatch.fused(hidden, weight)


# ---------------------------------------------------------------------------------------------- the custom ops


@torch.library.custom_op("graftwork::selected_log_probs", mutates_args=())
def _forward(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    entropies: bool,
    direction: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probabilities, entropies, log-sum-exps (N) and the direction (N x D); empty what is not asked for."""
    # What is asked of autocast was done to the inputs; the sums stay in float32.
    with torch.autocast(hidden_ND.device.type, enabled=False):
        if direction or not _fused(hidden_ND, weight_VD):
            return blocks.forward(hidden_ND, weight_VD, labels_N, bias_V, entropies, direction)
        from graftwork_kernels import selected_log_probs_triton as kernels

        selected, entropy, normaliser = kernels.forward(hidden_ND, weight_VD, labels_N, bias_V, entropies)
        return selected, entropy, normaliser, selected.new_empty(0, hidden_ND.shape[1])


@_forward.register_fake
def _(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    entropies: bool,
    direction: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    count, width = hidden_ND.shape
    sums = blocks.exact(hidden_ND.dtype)
    return (
        hidden_ND.new_empty(count, dtype=sums),
        hidden_ND.new_empty(count if entropies else 0, dtype=sums),
        hidden_ND.new_empty(count, dtype=sums),
        hidden_ND.new_empty(count if direction else 0, width, dtype=sums),
    )


@torch.library.custom_op("graftwork::selected_log_probs_backward", mutates_args=())
def _backward(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    normaliser_N: torch.Tensor,
    entropy_N: torch.Tensor,
    of_selected_N: torch.Tensor,
    of_entropy_N: torch.Tensor | None,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of hidden states, weight and bias; empty what is not in ``wanted``."""
    given = (hidden_ND, weight_VD, labels_N, bias_V, normaliser_N, entropy_N, of_selected_N, of_entropy_N)
    found = _gradients(hidden_ND, weight_VD, bias_V, wanted)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        if _fused(hidden_ND, weight_VD):
            from graftwork_kernels import selected_log_probs_triton as kernels

            kernels.backward(*given, wanted, found)
        else:
            blocks.backward(*given, wanted, found)
    return found


@_backward.register_fake
def _(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    normaliser_N: torch.Tensor,
    entropy_N: torch.Tensor,
    of_selected_N: torch.Tensor,
    of_entropy_N: torch.Tensor | None,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _gradients(hidden_ND, weight_VD, bias_V, wanted)


def _gradients(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return room for the gradients, empty for what is not in ``wanted``."""
    bias = weight_VD if bias_V is None else bias_V
    return (
        hidden_ND.new_empty(hidden_ND.shape if wanted[0] else (0,)),
        weight_VD.new_empty(weight_VD.shape if wanted[1] else (0,)),
        bias.new_empty(len(weight_VD) if wanted[2] else 0),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, labels, bias, ctx.entropies, ctx.direction = inputs
    _, entropy, normaliser, direction = output
    ctx.set_materialize_grads(False)
    ctx.dtype = hidden.dtype
    if ctx.direction:
        ctx.save_for_backward(direction)
    else:
        ctx.save_for_backward(hidden, weight, labels, bias, normaliser, entropy)


def _differentiate(
    ctx: Any, of_selected: torch.Tensor | None, of_entropy: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor | None, ...]:
    if not ctx.entropies:
        of_entropy = None
    if of_selected is None and of_entropy is None:
        return None, None, None, None, None, None
    if ctx.direction and of_selected is not None:
        (direction,) = ctx.saved_tensors
        return (direction * of_selected[:, None]).to(ctx.dtype), None, None, None, None, None
    hidden, weight, labels, bias, normaliser, entropy = ctx.saved_tensors
    if of_selected is None:
        of_selected = torch.zeros_like(normaliser)
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    found = _backward(hidden, weight, labels, bias, normaliser, entropy, of_selected, of_entropy, wanted)
    of_hidden, of_weight, of_bias = (one if asked else None for one, asked in zip(found, wanted, strict=True))
    return of_hidden, of_weight, None, of_bias, None, None


_forward.register_autograd(_differentiate, setup_context=_remember)
