"""Errors of one compression and of two: on the weight, on its outputs, and whether they add up.

Notation: ``f(W)`` is a compressed weight, ``err_f = W - f(W)``. A pair of compressions is additive on ``W`` at the
level of a norm where ``||err_fg|| <= ||err_f|| + ||err_g||`` (the framing of Harma et al., arXiv 2405.20935; the
inequality is ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def tensor_norm(error: torch.Tensor) -> float:
    """Return ``||E||_F`` of an error (m x n)."""
    return error.square().sum(dtype=torch.float64).sqrt().item()


def dot_norm(error: torch.Tensor, moments: torch.Tensor) -> float:
    """Return ``||X E^T||_F`` from the second moments ``X^T X`` (n x n), in the dtype of ``error``."""
    outputs = (error @ moments.to(error)) * error
    return outputs.sum(dtype=torch.float64).clamp_min(0).sqrt().item()


@dataclass(frozen=True)
class Gaps:
    """By how much the error of a pair is more than its parts' together, as a share of ``||W||`` (``||X W^T||``)."""

    tensor: float
    dot: float | None


def gaps(
    weight: torch.Tensor,
    joint: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    moments: torch.Tensor | None = None,
) -> Gaps:
    """Return the gaps of ``joint``, both compressions of ``weight``, over ``first`` and ``second``, each alone.

    All are m x n; ``moments`` is n x n. A gap above 0 says that the errors do not add up.
    """

    def gap(norm: float, *parts: float) -> float:
        whole, one, other = parts
        return (whole - (one + other)) / norm if norm else 0.0

    errors = [weight.double() - one.double() for one in (joint, first, second)]
    tensor = gap(tensor_norm(weight), *(tensor_norm(error) for error in errors))
    if moments is None:
        return Gaps(tensor, None)
    return Gaps(tensor, gap(dot_norm(weight, moments), *(dot_norm(error, moments) for error in errors)))


def low_rank_first_bound(weight: torch.Tensor, low: torch.Tensor, rounded: torch.Tensor) -> float:
    """Return what ``||W - Q(L(W))||`` never exceeds: ``||W - L(W)|| + ||L(W) - Q(L(W))||`` (triangle inequality).

    The second part is the rounding error of ``L(W)``, not of ``W``: it may be larger than that of ``W``, because
    ``L(W)`` may have larger entries.
    """
    return tensor_norm(weight - low) + tensor_norm(low - rounded)


def rounded_first_bound(weight: torch.Tensor, rounded: torch.Tensor, rank: int) -> float:
    """Return what ``||W - L_r(Q(W))||`` never exceeds: ``2 ||Q(W) - W|| + ||W - L_r(W)||`` (ours).

    ``L_r(Q(W))`` is the matrix of rank r next to ``Q(W)``, so no farther from it than ``L_r(W)`` is.
    """
    tail = torch.linalg.svdvals(weight.double())[rank:]
    return 2 * tensor_norm(rounded - weight) + float(tail.square().sum().sqrt())


def factor_errors(
    left: torch.Tensor, right: torch.Tensor, left_rounded: torch.Tensor, right_rounded: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ``E_A B``, ``A E_B`` and ``E_A E_B`` (m x n each), whose sum is ``Q(A) Q(B) - A B``.

    The error of each factor is amplified by the other, so it depends on how the singular values are split.
    """
    of_left, of_right = left_rounded - left, right_rounded - right
    return of_left @ right, left @ of_right, of_left @ of_right
