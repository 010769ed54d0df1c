"""A weight as a product of two thin matrices, nearest to it plainly or in what it does to its inputs.

With ``H = sum x x^T = L L^T`` (``L``: the whitener), the squared error of the outputs over all tokens is
``tr(D H D^T) = |D L|^2`` for ``D = W - W^``. So the best ``W^`` of rank ``r`` is the truncated singular value
decomposition of ``W L``, times ``L^-1``, and its error is the sum of the squared singular values that were cut off.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graftwork.errors import UserError

LIFT = 1e-6
"""How far the smallest eigenvalue is lifted above zero, where there is no Cholesky factor without."""


def rank_for(ratio: float, rows: int, columns: int, name: str = "") -> int:
    """Return the rank at which both factors hold ``ratio`` of the weight's numbers: ``floor(ratio m n / (m + n))``.

    It is at most the weight's own.

    Raises:
        UserError: there is not one rank to be had.
    """
    rank = math.floor(ratio * rows * columns / (rows + columns))
    if rank < 1:
        least = (rows + columns) / (rows * columns)
        raise UserError(
            f"ratio {ratio:g} leaves '{name}' ({rows} x {columns}) a rank of {rank}; the ratio must be "
            f"{least:.3g} or more"
        )
    return min(rank, rows, columns)


def whitener(moments: Tensor, *, damp: float = 0.0, name: str = "") -> Tensor:
    """Return the lower Cholesky factor (in x in, float64) of the second moments ``sum x x^T``.

    ``damp`` times the mean of their diagonal is added to it. Where there is no factor even so, ``-lambda + 1e-6`` is,
    too, with ``lambda`` the smallest eigenvalue: few tokens leave directions without any input. It is 1e-6 of the
    mean diagonal where that is less than one, or so large that 1e-6 is lost in it.

    Raises:
        UserError: the moments hold NaN or infinity, are all zero, or have an eigenvalue so negative that they are no
            second moments.
    """
    if not bool(torch.isfinite(moments).all()):
        raise UserError(
            f"the second moments of the inputs of '{name}' hold NaN or infinity; look at the weights before it, or "
            f"use float32"
        )
    wide = moments.double()
    mean = float(wide.diagonal().mean())
    identity = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    damped = wide + damp * mean * identity
    factor, info = torch.linalg.cholesky_ex(damped)
    if not int(info) and _sound(factor):
        return factor
    eigenvalues = torch.linalg.eigvalsh(damped)
    least, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    # Sums in float32 are off by a share of the largest eigenvalue, which may be many times the mean.
    if mean > 0 and least > -LIFT * largest:
        for lift in (LIFT * min(1.0, mean), LIFT * mean):
            factor, info = torch.linalg.cholesky_ex(damped + (max(-least, 0.0) + lift) * identity)
            if not int(info) and _sound(factor):
                return factor
    raise UserError(
        f"the second moments of the inputs of '{name}' cannot be factorised: their smallest eigenvalue is "
        f"{least:.3g} at a mean diagonal of {mean:.3g}; they need inputs that differ from zero, in float32 or wider"
    )


def _sound(factor: Tensor) -> bool:
    """Return whether every pivot is more than rounding.

    Moments of few tokens are singular; whether their factorisation fails or ends in noise depends on the processor.
    """
    pivots = factor.diagonal().square()
    noise = len(factor) * torch.finfo(factor.dtype).eps * float(factor.square().sum(1).max())
    return float(pivots.min()) > noise


def truncated(
    weight: Tensor, rank: int, whitener: Tensor | None = None, name: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U`` (out x r), ``S`` (r,) and ``V`` (r x in), float64: ``U diag(S) V`` is the best of rank ``r``.

    Args:
        weight: out x in.
        rank: ``r``.
        whitener: the lower triangular ``L`` (in x in) of the metric, or its diagonal (in,) where inputs are only
            scaled; None measures the weight itself. ``V`` is already multiplied by its inverse.
        name: of the weight, for errors.

    Raises:
        UserError: the weight holds NaN or infinity.
        ValueError: the weight has no such rank.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} of a weight {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise UserError(
            f"the weight '{name}' holds {bad} values that are no numbers (NaN or infinity) and cannot be factorised; "
            f"look at what made it"
        )
    wide = weight.detach().double()
    if whitener is not None:
        wide = wide * whitener if whitener.ndim == 1 else wide @ whitener
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    right = right[:rank]
    if whitener is not None:
        if whitener.ndim == 1:
            right = right / whitener
        else:
            right = torch.linalg.solve_triangular(whitener, right, upper=False, left=False)
    return left[:, :rank].contiguous(), values[:rank].clone(), right.contiguous()
