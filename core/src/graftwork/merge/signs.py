"""Which way most experts go, entry by entry, and what those that go that way have in common.

Deltas are experts x rows x columns in float32 (or float64), experts in their fixed order; sums are taken in float64,
one after the other, and rounded once.
"""

from __future__ import annotations

from typing import Literal

import torch

Aggregate = Literal["mean", "sum", "max"]


def total(deltas: torch.Tensor) -> torch.Tensor:
    """Return the sum over experts (rows x columns, float64)."""
    found = torch.zeros(deltas.shape[1:], dtype=torch.float64, device=deltas.device)
    for delta in deltas:
        found += delta
    return found


def elect(deltas: torch.Tensor) -> torch.Tensor:
    """Return the sign (-1, 0, 1) of the sum over experts, rows x columns, float32; 0 where the sum is exactly 0."""
    return total(deltas).sign().float()


def disjoint(deltas: torch.Tensor, signs: torch.Tensor, how: Aggregate = "mean") -> torch.Tensor:
    """Return mean, sum or largest (by size) over those experts whose entry has the sign of ``signs``.

    Entries without such an expert are 0. Returns rows x columns, float32. TIES-Merging, Yadav et al., NeurIPS 2023.
    """
    if how == "max":
        # Times a sign that is 0 or another, entries are at most 0.
        return (deltas * signs).amax(0).clamp_min_(0) * signs
    found = torch.zeros(deltas.shape[1:], dtype=torch.float64, device=deltas.device)
    count = torch.zeros_like(signs)
    for delta in deltas:
        agrees = delta * signs > 0
        found += torch.where(agrees, delta, 0)
        count += agrees
    if how == "mean":
        found /= count.clamp_min_(1)
    return found.float()
