"""How spread out a map of scores is over a model: three numbers of ours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

TOP = 5


@dataclass(frozen=True)
class Dispersion:
    """Of a map (layers x 2, attention first), with negative scores counted as zero.

    Attributes:
        entropy: H(s) / log(2 L), 0 where all is in one place, 1 where it is even.
        attention: the share of attention.
        top: the share of the five highest places.
        spread: how many places, evenly weighted, have this entropy: exp(H).
    """

    entropy: float
    attention: float
    top: float
    spread: float


def dispersion(scores: torch.Tensor) -> Dispersion | None:
    """Return the dispersion of a map; None where nothing in it is positive, or something is no number."""
    scores = scores.double().clamp(min=0)
    total = float(scores.sum())
    if not math.isfinite(total) or total <= 0:
        return None
    shares = (scores / total).flatten()
    entropy = float(torch.special.entr(shares).sum())
    return Dispersion(
        entropy / math.log(len(shares)),
        float(scores[:, 0].sum() / total),
        float(shares.topk(min(TOP, len(shares))).values.sum()),
        math.exp(entropy),
    )


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Return Spearman's rho of two maps; equal values share their mean rank. None where one is constant."""
    x, y = _ranks(a.flatten().double()), _ranks(b.flatten().double())
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return float((x * y).sum()) / size if size > 0 else None


def _ranks(values: torch.Tensor) -> torch.Tensor:
    _, place, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[place]
