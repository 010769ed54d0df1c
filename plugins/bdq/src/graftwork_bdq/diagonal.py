"""The diagonal of a place: a positive scale per input channel, from statistics or learned, folded before it.

A place is a set of linears that read the same input x (d channels). With ``s = exp(sigma)`` the input becomes
``x * s`` and the weight ``W / s``; without rounding nothing changes. ``sigma`` lives where the scale is folded to: per
output channel of the source (norm weight, rows of up_proj, rows of v_proj). Query heads that share a value head
share its scales, so the o place has one number per value channel.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from graftwork import UserError
from graftwork.transform.structure import Place
from torch import nn

Form = Literal["full", "kron", "none", "row"]
LIMIT = 8.0
FLOOR = 1e-4


def scales(sigma: torch.Tensor) -> torch.Tensor:
    """Return ``exp(sigma)``, with sigma held within +-8."""
    return sigma.clamp(-LIMIT, LIMIT).exp()


def energy_sigma(inputs: torch.Tensor, weights: torch.Tensor, floor: float = FLOOR) -> torch.Tensor:
    """Return ln s with ``s_j^2 = ||W_:j|| / ||X_:j||``, its mean taken out (ours).

    ``inputs`` and ``weights`` (d) are the energies ``sum_t X_tj^2`` and ``sum_i W_ij^2``. After a rotation that
    flattens both, the output error is proportional to ``||X s||_F^2 ||W / s||_F^2``. By Cauchy-Schwarz this s makes it
    least, ``(sum_j ||X_:j|| ||W_:j||)^2``. Norms below ``floor`` times their mean are lifted to it, so that a channel
    that is never used gets no boundless scale.
    """
    return _centred((_norms(weights, floor).log() - _norms(inputs, floor).log()) / 2)


def smooth_sigma(
    inputs: torch.Tensor, weights: torch.Tensor, alpha: float, floor: float = 1e-5
) -> torch.Tensor:
    """Return ln s of SmoothQuant: the input is divided by ``max|X_:j|^alpha / max|W_:j|^(1 - alpha)``.

    ``inputs`` and ``weights`` (d) are the largest absolute values. Xiao et al., ICML 2023, equation 4; the floor is
    llm-compressor's.
    """
    x, w = inputs.double().clamp_min(floor), weights.double().clamp_min(floor)
    return (1 - alpha) * w.log() - alpha * x.log()


def pooled(values: torch.Tensor, place: Place) -> torch.Tensor:
    """Return the sum of ``values`` (d) over the inputs that one channel of the source feeds."""
    return place.gathered(values) * place.repeats


def factors(size: int) -> tuple[int, int]:
    """Return ``n1 <= n2`` with ``n1 n2 = size``, as near to each other as the integers allow."""
    first = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    return first, size // first


def kron_projected(sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a (n1) and b (n2) whose sums ``a_i + b_j`` are nearest to ``sigma`` (n1 n2), by least squares."""
    table = sigma.reshape(factors(len(sigma)))
    rows = table.mean(1)
    return rows, table.mean(0) - rows.mean()


def kron_spread(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return ``a_i + b_j`` as a vector (n1 n2): its exponential is ``kron(exp a, exp b)``."""
    return (first[:, None] + second).flatten()


class Diagonal(nn.Module):
    """Ln of the scales of one place, per output channel of its source (n), as parameters of the form asked for.

    ``full`` has one per channel, ``kron`` a vector of n1 and one of n2 whose Kronecker product the scales are (the
    reading of BDQ's two diagonals that fits its appendix), ``none`` has none.
    """

    origin: torch.Tensor

    def __init__(self, sigma: torch.Tensor, form: Form) -> None:
        super().__init__()
        self.form, self.size = form, len(sigma)
        start = sigma.detach().float()
        self.register_buffer("origin", torch.zeros_like(start), persistent=False)
        if form == "full":
            self.sigma = nn.Parameter(start.clone())
        elif form == "kron":
            first, second = kron_projected(start)
            self.first, self.second = nn.Parameter(first.clone()), nn.Parameter(second.clone())
        elif form == "row":
            raise UserError(ROW)

    def forward(self) -> torch.Tensor:
        """Return ln s (n)."""
        if self.form == "full":
            return self.sigma
        if self.form == "kron":
            return kron_spread(self.first, self.second)
        return self.origin


ROW = (
    "plugins.bdq.diag: a scale per row or token cannot change anything where every row of a weight and every token has "
    "a rounding scale of its own, as here: the rounding grows with it; take full or kron"
)


def fold_into(source: Any, scale: torch.Tensor, kind: Literal["norm", "linear"]) -> None:
    """Multiply the output channels of ``source`` with ``scale`` (n), in float64, in place.

    Raises:
        UserError: a norm that adds to its weight before it multiplies.
    """
    factor = scale.detach().double()
    with torch.no_grad():
        weight = source.weight
        wide = factor if kind == "norm" else factor[:, None]
        if kind == "norm" and not _multiplies(source):
            # Gemma's norms multiply with 1 + weight.
            weight.copy_((1 + weight.double()) * wide - 1)
        else:
            weight.copy_(weight.double() * wide)
        bias = getattr(source, "bias", None)
        if bias is not None:
            bias.copy_(bias.double() * factor)


def _multiplies(norm: Any) -> bool:
    """Return whether the norm's output is proportional to its weight, by trying it on one vector."""
    size = norm.weight.shape[0]
    weight = norm.weight
    probe = torch.linspace(-1, 1, size, dtype=weight.dtype, device=weight.device)[None]
    kept = weight.detach().clone()
    bias = getattr(norm, "bias", None)
    with torch.no_grad():
        try:
            weight.zero_()
            out = norm(probe)
        finally:
            weight.copy_(kept)
    if bias is not None:
        out = out - bias
    return bool((out == 0).all())


def _norms(energies: torch.Tensor, floor: float) -> torch.Tensor:
    norms = energies.double().sqrt()
    least = floor * norms.mean()
    return norms.clamp_min(least if least > 0 else 1)


def _centred(sigma: torch.Tensor) -> torch.Tensor:
    return sigma - sigma.mean()
