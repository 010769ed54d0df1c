"""A diagonal on the inputs of a place, folded into what makes them: nothing is left to do when the model runs."""

from __future__ import annotations

from typing import Any

import torch


def scale_norm(norm: Any, factor: torch.Tensor) -> None:
    """Multiply the outputs of a norm with ``factor`` (d), in place."""
    with torch.no_grad():
        weight = norm.weight
        # Some norms multiply with 1 + weight.
        shift = 0.0 if _multiplies(norm) else 1.0
        weight.copy_((weight.double() + shift) * factor.double() - shift)
        if getattr(norm, "bias", None) is not None:
            norm.bias.copy_(norm.bias.double() * factor.double())


def scale_rows(linear: Any, factor: torch.Tensor) -> None:
    """Multiply the outputs of a plain linear with ``factor`` (m), in place."""
    with torch.no_grad():
        linear.weight.copy_(linear.weight.double() * factor.double()[:, None])
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.double() * factor.double())


def scale_columns(linear: Any, factor: torch.Tensor) -> None:
    """Multiply the inputs of a plain linear with ``factor`` (n), in place."""
    with torch.no_grad():
        linear.weight.copy_(linear.weight.double() * factor.double())


def _multiplies(norm: Any) -> bool:
    """Return whether a norm with a weight of zeros gives nothing but its bias."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    kept = weight.detach().clone()
    probe = torch.linspace(-1, 1, len(weight), dtype=weight.dtype, device=weight.device)[None]
    with torch.no_grad():
        weight.zero_()
        out = norm(probe)
        weight.copy_(kept)
    return bool((out == (0 if bias is None else bias)).all())
