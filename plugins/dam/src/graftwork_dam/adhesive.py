"""The adhesive: a positive diagonal ``d`` between two factors, ``A = U diag(d)`` and ``B = diag(S/d) V``.

Without rounding it cancels. With rounding, rows of ``B`` do not feel it, since each has a scale of its own; rows of
``A`` do, because a large ``d_k`` takes the range from their other columns; and latents ``h = x B^T``, whose channel
``k`` is as large as ``S_k / d_k``, do the other way round. Diagonals are held as logarithms (``log_d``, r).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

LIMIT = 12.0
"""Logarithms are kept within this distance of their mean."""
FLOOR = 1e-12
"""Values below this share of the largest count as this share of it: a diagonal needs logarithms."""
POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)

_POWER = re.compile(r"p(\d+(?:\.\d+)?)")
_SMOOTH = re.compile(r"smoothquant(\d*(?:\.\d+)?)")


def normalised(log_d: torch.Tensor) -> torch.Tensor:
    """Return ``log_d`` with mean 0, within ``LIMIT``: a factor that all of ``d`` share changes nothing."""
    return (log_d - log_d.mean()).clamp(-LIMIT, LIMIT)


def logarithms(values: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of values that are not negative; those next to zero are lifted (``FLOOR``)."""
    top = values.max()
    return (values.clamp_min(FLOOR * top) if top > 0 else torch.ones_like(values)).log()


def power_split(values: torch.Tensor, power: float) -> torch.Tensor:
    """Return the logarithm of ``d = S^p``: 0 is (U, S V), 1/2 is SVD-LLM's split, 1 is (U S, V)."""
    return power * logarithms(values)


def smooth_split(latent: torch.Tensor, column: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the logarithm of ``d_k = s_k^alpha / a_k^(1-alpha)``: SmoothQuant's compromise, in rank space (ours).

    ``latent`` (r): ``s_k = max_t |h_tk|`` at ``d = 1``. ``column`` (r): ``a_k = max_i |U_ik|``. With ``alpha`` 1
    latents are all equally large, which is best where only they are rounded; with 0 the columns of ``A`` are.
    """
    return alpha * logarithms(latent) - (1 - alpha) * logarithms(column)


def latent_error(log_d: torch.Tensor, latent: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Return what the output error is proportional to where only latents are rounded, in leading order (ours).

    ``max_k (s_k/d_k)^2 sum_k d_k^2 ||U_k||^2``: each token's step is set by its largest channel, and the error of
    channel ``k`` reaches the output through column ``k`` of ``A``.
    """
    step = (latent.log() - log_d).max()
    return (2 * step).exp() * ((2 * log_d).exp() * left.square().sum(0)).sum()


def parse_init(text: str) -> tuple[str, float]:
    """Return the kind of a start (``grid``, ``power``, ``smoothquant``) and its exponent.

    ``p0``, ``p05``, ``p1`` (a leading 0 stands for ``0.``), ``p0.3``; ``smoothquant`` is ``smoothquant0.5``.

    Raises:
        ValueError: another form, or an exponent outside 0 to 1.
    """
    if text == "grid":
        return "grid", 0.0
    power, smooth = _POWER.fullmatch(text), _SMOOTH.fullmatch(text)
    if power is None and smooth is None:
        raise ValueError(f"'{text}' is none of grid, p0, p05, p1, p<power>, smoothquant, smoothquant<alpha>")
    digits = power[1] if power else (smooth[1] if smooth and smooth[1] else "0.5")
    if len(digits) > 1 and digits[0] == "0" and "." not in digits:
        digits = f"0.{digits[1:]}"
    if not 0 <= float(digits) <= 1:
        raise ValueError(f"'{text}': the exponent lies between 0 and 1")
    return ("power" if power else "smoothquant"), float(digits)


def candidates(
    init: str, values: torch.Tensor, latent: torch.Tensor, column: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the starts that ``init`` names: name to normalised ``log_d`` (r)."""
    kind, exponent = parse_init(init)
    powers: Sequence[float] = POWERS if kind == "grid" else (exponent,) if kind == "power" else ()
    alphas: Sequence[float] = ALPHAS if kind == "grid" else (exponent,) if kind == "smoothquant" else ()
    found = {f"p{power:g}": power_split(values, power) for power in powers}
    found |= {f"smoothquant{alpha:g}": smooth_split(latent, column, alpha) for alpha in alphas}
    return {name: normalised(log_d) for name, log_d in found.items()}
