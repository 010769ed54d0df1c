"""What two rounded factors make of their inputs, with gradients to the diagonals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from graftwork.transform.quantizer import TOKEN_FLOOR, fake_quantize_tokens, fake_quantize_weight
from graftwork.transform.scheme import ActivationScheme, WeightScheme
from graftwork_kernels import scaled_quantize as kernel

from graftwork_dam.factor import Factors

LEAST_SCALE = 1e-30
"""Of weights; only a slice of zeros has less."""


@dataclass(frozen=True)
class Rounding:
    """How weights (per row, or groups of it), inputs and latents (per token) are rounded."""

    weights: WeightScheme
    inputs: ActivationScheme
    latents: ActivationScheme

    @property
    def of_tokens(self) -> bool:
        """Whether anything is rounded that depends on the token."""
        return self.inputs.rounds or self.latents.rounds


def product_output(
    x: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    rounding: Rounding,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``Q_l(Q_a(x) right^T) left^T`` (... x m) for weights that are as they are meant to be.

    ``scale`` (n) multiplies x before it is rounded.
    """
    latents = _tokens(x, rounding.inputs, scale) @ right.T
    return _tokens(latents, rounding.latents) @ left.T


def adhered_output(
    x: torch.Tensor,
    factors: Factors,
    log_d: torch.Tensor,
    rounding: Rounding,
    log_e: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``Q_l(Q_a(x) Q_w(B(d))^T) Q_w(A(d))^T`` (... x m); rounding is straight-through.

    ``log_e`` (n): a diagonal on the inputs, too: ``x / e`` and the columns of ``B`` times ``e``.
    """
    d = log_d.exp()
    left = _weight(factors.left, rounding.weights, d)
    right = _weight(factors.scaled / d[:, None], rounding.weights, None if log_e is None else log_e.exp())
    return product_output(x, left, right, rounding, None if log_e is None else (-log_e).exp())


def _tokens(x: torch.Tensor, scheme: ActivationScheme, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``Q(x * scale)`` with a range per token, in one pass; bit for bit the core's on a CPU."""
    if not scheme.rounds or x.dtype not in (torch.float32, torch.float64):
        # The core rounds half precision in half precision.
        return fake_quantize_tokens(x if scale is None else x * scale, scheme)
    half = scheme.convention == "half-range"
    how = kernel.Rounding(
        scheme.bits, symmetric=scheme.symmetric, half_range=half, ratio=scheme.ratio, floor=TOKEN_FLOOR
    )
    return kernel.fake_scaled_quantize(x, how, scale)


def _weight(weight: torch.Tensor, scheme: WeightScheme, scale: torch.Tensor | None) -> torch.Tensor:
    """Return ``Q(weight * scale)`` with a range per row or group, in one pass; bit for bit the core's on a CPU."""
    if not scheme.rounds or scheme.clip != "none" or weight.dtype not in (torch.float32, torch.float64):
        # The range with the least error is looked for in many passes.
        return fake_quantize_weight(weight if scale is None else weight * scale, scheme)
    half = scheme.convention == "half-range"
    how = kernel.Rounding(scheme.bits, scheme.group, scheme.symmetric, half, floor=LEAST_SCALE)
    return kernel.fake_scaled_quantize(weight, how, scale)


def relative_loss(found: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return ``||Y - Y^||_F^2 / ||Y||_F^2``."""
    return (found - target).square().sum() / target.square().sum().clamp_min(torch.finfo(target.dtype).tiny)
