"""How evenly a matrix spreads its energy, and the row and column scales that spread it most evenly.

With ``P_ij = W_ij^2 / sum W^2`` the flatness of W (m x n) is ``F = sum_ij P_ij ln P_ij`` (BDQ), the negative entropy of
the energy: ``-ln(mn)`` where all entries have the same size, 0 where one entry has everything. F is a diagnostic, not
the rounding error: scaling a row changes F and, where every row has a scale of its own, not the rounded model.
"""

from __future__ import annotations

import math

import torch


def flatness(weight: torch.Tensor) -> torch.Tensor:
    """Return F of ``weight`` (any shape, N entries) as a float64 scalar in [-ln N, 0].

    Raises:
        ValueError: no entry, no energy at all, or an entry that is no number.
    """
    values = weight.detach().double().abs()
    largest = values.max() if values.numel() else values.new_zeros(())
    if not bool(torch.isfinite(values).all()) or not largest > 0:
        raise ValueError("flatness is that of a matrix with finite entries, not all of them zero")
    # Divided first, so that squares of very small or large entries stay numbers.
    energy = (values / largest).square()
    shares = energy / energy.sum()
    return torch.special.xlogy(shares, shares).sum().clamp_max(0)


def concentration(weight: torch.Tensor) -> torch.Tensor:
    """Return ``1 + F / ln N``: 0 for a flat matrix, 1 where one entry has everything (a single entry: 0)."""
    count = weight.numel()
    return 1 + flatness(weight) / math.log(count) if count > 1 else torch.zeros((), dtype=torch.float64)


def row_update(weight: torch.Tensor) -> torch.Tensor:
    """Return factors (m, float64) for the rows of ``weight`` (m x n) that make F least for these columns.

    With the distribution inside each row fixed, ``F = sum_i r_i ln r_i - sum_i r_i H_i``, where r_i is the row's share
    of the energy and H_i the entropy inside it. The least value, ``-ln sum_i exp(H_i)``, is at ``r_i ~ exp(H_i)``
    (ours). Rows of zeros keep the factor 1; the factors' geometric mean over the others is 1.
    """
    energy = weight.detach().double().square()
    total = energy.sum(1)
    there = total > 0
    inside = energy / torch.where(there, total, 1)[:, None]
    entropy = -torch.special.xlogy(inside, inside).sum(1)
    log = torch.where(there, (entropy - torch.where(there, total, 1).log()) / 2, 0)
    return torch.where(there, (log - log[there].mean()).exp(), 1)


def flattest(
    weight: torch.Tensor, *, rounds: int = 500, tolerance: float = 1e-12
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors of rows (m) and columns (n), float64, that make ``diag(rows) W diag(columns)`` flattest.

    Rows and columns take turns (:func:`row_update`), and no turn raises F. Ends when a round gains less than
    ``tolerance``. Balancing all rows and columns to the same energy (Sinkhorn) is not the optimum.
    """
    scaled = weight.detach().double()
    rows, columns = scaled.new_ones(scaled.shape[0]), scaled.new_ones(scaled.shape[1])
    before = flatness(scaled)
    for _ in range(rounds):
        factors = row_update(scaled)
        rows, scaled = rows * factors, scaled * factors[:, None]
        factors = row_update(scaled.T)
        columns, scaled = columns * factors, scaled * factors
        after = flatness(scaled)
        if before - after < tolerance:
            break
        before = after
    return rows, columns
