"""The closed form of an edit: least squares on keys and residuals, held back by the second moments of other keys.

    dW = R K^T (lam C + eps I + K K^T)^-1,   eps = ridge * trace(lam C) / d

Never an inverse, never below float64. For n <= d edits by Woodbury: with A = lam C + eps I, Z = A^-1 K and
S = I + K^T Z it is dW = R S^-1 Z^T; for more by the d x d matrix itself. Protocol section 3; the ridge is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graftwork.edit.errors import StatsError

RIDGE = 1e-6


@dataclass(frozen=True)
class Factor:
    """Cholesky factor of ``A = lam C + eps I`` (d x d, lower, float64), to be used for many batches.

    ``condition`` is an estimate from the factor's diagonal, (max / min)^2, a lower bound of the condition number.
    """

    lower: torch.Tensor
    lam: float
    eps: float
    condition: float

    @property
    def d(self) -> int:
        return len(self.lower)

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """Return ``A^-1 right`` (d x n)."""
        return torch.cholesky_solve(right, self.lower)

    def full(self) -> torch.Tensor:
        """Return A itself."""
        return self.lower @ self.lower.T


@dataclass(frozen=True)
class Update:
    """``dW = left right^T`` (h x d) of rank n at most, all float64.

    Attributes:
        left: h x n, the residuals R.
        right: d x n.
        gain: n; the share of its own residual that each key gets, ``k^T dW-direction`` with all other residuals at
            zero. For one edit it is c / (lam + c) with c = k^T C^-1 k (without the ridge).
        condition: of A; see :class:`Factor`.
    """

    left: torch.Tensor
    right: torch.Tensor
    gain: torch.Tensor
    condition: float

    def dense(self) -> torch.Tensor:
        return self.left @ self.right.T

    @property
    def norm(self) -> float:
        """Frobenius norm of dW, without making it."""
        return float(((self.left.T @ self.left) * (self.right.T @ self.right)).sum().clamp(min=0).sqrt())


def factorise(moment: torch.Tensor, lam: float, *, ridge: float = RIDGE, where: str = "") -> Factor:
    """Return the factor of ``lam C + eps I`` for second moments ``C`` (d x d).

    Raises:
        StatsError: C holds NaN or infinity, or is not positive definite even with the ridge; the number of dead
            directions is told.
    """
    moment = moment.double()
    d = len(moment)
    place = f"'{where}': " if where else ""
    if not bool(torch.isfinite(moment).all()):
        raise StatsError(
            f"{place}the second moments hold {int((~torch.isfinite(moment)).sum())} values that are no numbers"
        )
    eps = ridge * lam * float(moment.trace()) / d
    matrix = lam * moment
    matrix.diagonal().add_(eps)
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        dead = int((moment.diagonal() <= 0).sum())
        raise StatsError(
            f"{place}the second moments are singular beyond the ridge of {ridge:g} ({dead} of {d} inputs are dead); "
            f"take more text for the statistics, or set the ridge higher"
        )
    diagonal = lower.diagonal()
    return Factor(lower, lam, eps, float((diagonal.max() / diagonal.min()) ** 2))


def solve_update(residuals: torch.Tensor, keys: torch.Tensor, factor: Factor) -> Update:
    """Return the update for residuals R (h x n) at keys K (d x n).

    Raises:
        StatsError: a key or residual that is no number, or a system that cannot be factored.
    """
    residuals, keys = residuals.double(), keys.double()
    for name, values in (("keys", keys), ("residuals", residuals)):
        if not bool(torch.isfinite(values).all()):
            raise StatsError(
                f"{name} of an edit are no numbers (NaN or infinity); look at the model's weights"
            )
    n = keys.shape[1]
    if n > factor.d:
        lower, failed = torch.linalg.cholesky_ex(factor.full() + keys @ keys.T)
        if int(failed):
            raise StatsError("lam C + K K^T cannot be factored; the second moments are too close to singular")
        right = torch.cholesky_solve(keys, lower)
    else:
        z = factor.solve(keys)
        inner = keys.T @ z
        inner = (inner + inner.T) / 2
        inner.diagonal().add_(1)
        lower, failed = torch.linalg.cholesky_ex(inner)
        if int(failed):
            raise StatsError(
                "I + K^T A^-1 K cannot be factored; the second moments are too close to singular"
            )
        right = torch.cholesky_solve(z.T, lower).T
    return Update(residuals, right, (keys * right).sum(0), factor.condition)


def rank_one(residual: torch.Tensor, key: torch.Tensor, factor: Factor) -> Update:
    """Return ``r (A^-1 k)^T / (k^T A^-1 k)``: the key gets all of its residual (h and d entries)."""
    residual, key = residual.double()[:, None], key.double()[:, None]
    direction = factor.solve(key)
    right = direction / (key * direction).sum()
    return Update(residual, right, torch.ones(1, dtype=torch.float64), factor.condition)
