"""How far apart two distributions are."""

from __future__ import annotations

import math

import torch


def jensen_shannon(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return the Jensen-Shannon divergence of every row in nats, ``... x 1``, from log-probabilities ``... x V``.

    It lies between 0 (equal) and log 2 (nothing in common).
    """
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    return (0.5 * (_kl(log_p, middle) + _kl(log_q, middle))).clamp(0, math.log(2))


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    # What cannot happen adds nothing; where p is positive, so is the middle.
    gain = torch.where(log_p == -torch.inf, 0.0, log_p - log_q)
    return (log_p.exp() * gain).sum(-1, keepdim=True)
