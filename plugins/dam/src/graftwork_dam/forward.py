"""What two rounded factors make of their inputs, with gradients to the diagonals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from graftwork.transform.quantizer import fake_quantize_tokens, fake_quantize_weight
from graftwork.transform.scheme import ActivationScheme, WeightScheme

from graftwork_dam.factor import Factors


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
    x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, rounding: Rounding
) -> torch.Tensor:
    """Return ``Q_l(Q_a(x) right^T) left^T`` (... x m) for weights that are as they are meant to be."""
    latents = fake_quantize_tokens(x, rounding.inputs) @ right.T
    return fake_quantize_tokens(latents, rounding.latents) @ left.T


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
    left, right = factors.split(log_d)
    if log_e is not None:
        x, right = x * (-log_e).exp(), right * log_e.exp()
    weights = rounding.weights
    return product_output(
        x, fake_quantize_weight(left, weights), fake_quantize_weight(right, weights), rounding
    )


def relative_loss(found: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return ``||Y - Y^||_F^2 / ||Y||_F^2``."""
    return (found - target).square().sum() / target.square().sum().clamp_min(torch.finfo(target.dtype).tiny)
