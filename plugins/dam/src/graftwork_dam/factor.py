"""A weight as two factors: the best approximation of a rank, plain or in the metric of the layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from graftwork import UserError
from graftwork.transform.lowrank import rank_for, truncated

NOISE = 1e-5
"""Eigenvalues of second moments down to minus this share of the largest count as zero: sums are in float32."""


@dataclass(frozen=True)
class Factors:
    """``L_r(W) = left @ scaled``, with the singular values apart so that they can be split.

    Attributes:
        left: U (m x r), orthonormal columns.
        values: S (r), positive, largest first.
        scaled: diag(S) V (r x n). It is ``U^T W`` in either metric: a whitened approximation projects the columns of
            W onto U, so no inverse of the whitener and no ``1/S`` is needed.
    """

    left: torch.Tensor
    values: torch.Tensor
    scaled: torch.Tensor

    @property
    def rank(self) -> int:
        return self.values.numel()

    def product(self) -> torch.Tensor:
        """Return ``L_r(W)`` (m x n)."""
        return self.left @ self.scaled

    def split(self, log_d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``A(d) = U diag(d)`` (m x r) and ``B(d) = diag(S/d) V`` (r x n) for ``d = exp(log_d)``."""
        d = log_d.exp()
        return self.left * d, self.scaled / d[:, None]

    def first(self, rank: int) -> Factors:
        """Return the best approximation of a smaller rank."""
        return Factors(self.left[:, :rank], self.values[:rank], self.scaled[:rank])

    def to(self, dtype: torch.dtype) -> Factors:
        return Factors(self.left.to(dtype), self.values.to(dtype), self.scaled.to(dtype))


def factorise(
    weight: torch.Tensor,
    rank: int,
    *,
    moments: torch.Tensor | None = None,
    damp: float = 0.0,
    name: str = "",
) -> Factors:
    """Return the factors (float64) of the best approximation of ``weight`` (m x n) of that rank.

    Without ``moments`` it is the best in ``||W - L||_F``; with them (n x n, ``sum x x^T``) the best in
    ``||X (W - L)^T||_F``, as SVD-LLM's whitening has it (arXiv 2403.07378). ``damp`` times the mean of their diagonal
    is added to it.

    Raises:
        UserError: the moments are not positive definite, and cannot be mended.
    """
    weight = weight.detach().double()
    metric = weight if moments is None else weight @ root(moments, damp=damp, name=name)
    left, values, _ = truncated(metric, rank, name=name)
    return Factors(left, values, left.T @ weight)


def root(moments: torch.Tensor, *, damp: float = 0.0, name: str = "") -> torch.Tensor:
    """Return ``R`` (n x n, float64) with ``R R^T`` the second moments, plus ``damp`` times their mean diagonal.

    It is the Cholesky factor where there is one. Inputs that never fill all directions (few tokens, a small
    vocabulary) leave none; then it is made of eigenvectors, without those of eigenvalue 0. Nothing here inverts it.

    Raises:
        UserError: an eigenvalue so negative that these are no second moments.
    """
    wide = moments.double()
    wide = wide + damp * wide.diagonal().mean() * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    factor, info = torch.linalg.cholesky_ex(wide)
    if not int(info):
        return factor
    values, vectors = torch.linalg.eigh(wide)
    least, largest = values[0].item(), values[-1].item()
    if not least >= -NOISE * largest:
        raise UserError(
            f"the second moments of the inputs of '{name}' have an eigenvalue of {least:.3g} (the largest is "
            f"{largest:.3g}), so they are none; raise plugins.dam.damp, or use float32"
        )
    return vectors * values.clamp_min(0).sqrt()


def choose_rank(
    rows: int, columns: int, *, ratio: float, rank: int | None, group: int | None, name: str
) -> int:
    """Return the rank of a weight (``rows`` x ``columns``): ``rank``, or what keeps ``ratio`` of its parameters.

    ``group`` values of a row of the left factor share a scale, so the rank that follows from ``ratio`` is lowered to
    a multiple of it.

    Raises:
        UserError: less than 1 (or than the group), or more than the weight has.
    """
    size = f"'{name}' ({rows} x {columns})"
    if rank is not None:
        if rank > min(rows, columns):
            raise UserError(
                f"rank {rank} is more than {size} has, which is {min(rows, columns)}; lower plugins.dam.rank, or "
                f"leave the layer out with plugins.dam.targets"
            )
        return rank
    found = rank_for(ratio, rows, columns, name)
    if group is None:
        return found
    if found < group:
        raise UserError(
            f"a ratio of {ratio:g} leaves {size} the rank {found}, less than the group size {group}, which must "
            f"divide it; raise plugins.dam.ratio or lower plugins.dam.group"
        )
    return found - found % group
