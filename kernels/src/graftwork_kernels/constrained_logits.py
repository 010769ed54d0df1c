"""COIECD's constrained logits: from two rows of logits to the scores of a decoding step.

z2 (``main``) and z1 (``contrast``) are the logits of one model with and without a context, l2 and l1 their
log-probabilities, g = l2 - l1, H1 the entropy of exp l1 in nats. A token is *violating* where z2 is beyond a bound of
its row (Yuan et al., Findings of ACL 2024, and its official code; that H1 cancels in the first form is ours)::

    ratio r:    z2 > max z2 - log r     none where that is exactly one token       or  z2 < min z2 + log r
    gamma:      -l2 - H1 <= -gamma                                                 or  -l2 - H1 >= gamma
    score = z2 + tau g,   tau = alpha where violating, else alpha - 1    (turned round where ``swapped``)

which is ``l2 + alpha g`` or ``l1 + alpha g`` up to a constant of the row. Where tau is 0 the score is z2 bit for bit.
What is -inf in z2 stays so and is in neither set; a token that only z1 rules out is -inf under a negative tau, and
counts as z1's least likely one under a positive.

A kernel reads both rows twice, the second time from the cache: for maximum, second maximum, least finite logit, sum and
moment first, and then to write. The second maximum stands for counting: exactly one token is above a bound where the
second is not.

Shapes: B rows, V words; x_BV is B x V.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from graftwork_kernels import dispatch

# exp of it is 0 in float64, and times 0 it is no NaN.
FLOOR = -1000.0


class Constrained(NamedTuple):
    """What :func:`constrained_logits` returns.

    Attributes:
        scores: B x V, in the dtype of ``main``, on its scale.
        main_normaliser, contrast_normaliser: B, log-sum-exp. Finite where the row is a distribution: not where it has
            NaN, infinity, or nothing but -inf. Scores of another row mean nothing.
        entropy: B, H1, nats.
        above, below: B, bounds on ``main``; see :func:`violating`. ``above`` is inf where no token is likely enough.
    """

    scores: torch.Tensor
    main_normaliser: torch.Tensor
    contrast_normaliser: torch.Tensor
    entropy: torch.Tensor
    above: torch.Tensor
    below: torch.Tensor


def constrained_logits(
    main_BV: torch.Tensor,
    contrast_BV: torch.Tensor,
    *,
    alpha: float = 1.0,
    ratio: float = 4.0,
    gamma: float | None = None,
    swapped: bool = False,
) -> Constrained:
    """Return scores and what they are made of; all but the scores in float32 (float64 for float64 logits).

    ``ratio`` is the official code's 1 / lambda, from 1 to inf; ``gamma`` (nats) takes its place where given. There is
    no gradient: it is a step of decoding.

    Raises:
        ValueError: shapes or dtypes that differ, no words, integers, or a setting out of bounds.
    """
    if main_BV.dim() != 2 or main_BV.shape != contrast_BV.shape or not main_BV.shape[1]:
        raise ValueError(
            f"both logits are B x V of equal shape, V > 0, not {tuple(main_BV.shape)} and {tuple(contrast_BV.shape)}"
        )
    if main_BV.dtype != contrast_BV.dtype or not main_BV.is_floating_point():
        raise ValueError(
            f"both logits are of one floating dtype, not {main_BV.dtype} and {contrast_BV.dtype}"
        )
    if not 0 <= alpha < math.inf or not ratio >= 1 or (gamma is not None and not gamma >= 0):
        raise ValueError(
            f"0 <= alpha < inf, ratio >= 1 and gamma >= 0, not alpha {alpha}, ratio {ratio}, gamma {gamma}"
        )
    scores, rows = _constrained(
        main_BV, contrast_BV, alpha, math.log(ratio) if gamma is None else gamma, gamma is not None, swapped
    )
    return Constrained(scores, *rows.unbind())


def violating(
    main_BV: torch.Tensor, above_B: torch.Tensor, below_B: torch.Tensor, *, banded: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens (bool, B x V each) beyond the bounds of :class:`Constrained`: likely ones, and unlikely ones.

    ``banded``: the bounds are those of ``gamma``, which belong to the sets; those of ``ratio`` do not.
    """
    above, below = above_B[:, None], below_B[:, None]
    possible = main_BV > -torch.inf
    if banded:
        return possible & (main_BV >= above), possible & (main_BV <= below)
    return possible & (main_BV > above), possible & (main_BV < below)


def ratio_bounds(main_BV: torch.Tensor, margin: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bounds (B each) of the ratio ``exp(margin)``; see :class:`Constrained`."""
    largest = main_BV.amax(1, keepdim=True)
    above = largest - margin
    # Exactly one token above is none: decided, not disputed.
    single = (main_BV > above).sum(1) == 1
    least = main_BV.masked_fill(main_BV == -torch.inf, torch.inf).amin(1)
    return above.squeeze(1).masked_fill(single, torch.inf), least + margin


def constrained_logits_reference(
    main_BV: torch.Tensor,
    contrast_BV: torch.Tensor,
    *,
    alpha: float = 1.0,
    ratio: float = 4.0,
    gamma: float | None = None,
    swapped: bool = False,
) -> Constrained:
    """Return :func:`constrained_logits` from the formulas, in the dtype of the logits."""
    l2, l1 = main_BV.log_softmax(1), contrast_BV.log_softmax(1)
    ruled_out = contrast_BV == -torch.inf
    entropy = -torch.where(ruled_out, 0.0, l1.exp() * l1).sum(1)
    normalisers = main_BV.logsumexp(1), contrast_BV.logsumexp(1)
    if gamma is None:
        bounds = ratio_bounds(main_BV, math.log(ratio))
    else:
        bounds = normalisers[0] - entropy + gamma, normalisers[0] - entropy - gamma
    likely, unlikely = violating(main_BV, *bounds, banded=gamma is not None)
    least = l1.masked_fill(ruled_out, torch.inf).amin(1, keepdim=True)
    gain = l2 - torch.where(ruled_out, least, l1)
    tau = torch.where((likely | unlikely) ^ swapped, alpha, alpha - 1.0).to(main_BV.dtype)
    scores = torch.where(tau == 0, main_BV, main_BV + tau * gain)
    gone = (main_BV == -torch.inf) | (ruled_out & (tau < 0))
    return Constrained(scores.masked_fill(gone, -torch.inf), *normalisers, entropy, *bounds)


@torch.library.custom_op("graftwork::constrained_logits", mutates_args=())
def _constrained(
    main_BV: torch.Tensor, contrast_BV: torch.Tensor, alpha: float, margin: float, banded: bool, swapped: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores, and the other fields of :class:`Constrained` in its order (5 x B)."""
    if main_BV.dtype != torch.float64 and dispatch.fused(main_BV, contrast_BV):
        from graftwork_kernels import constrained_logits_triton as kernels

        return kernels.constrained(main_BV, contrast_BV, alpha, margin, banded, swapped)
    sums = torch.promote_types(main_BV.dtype, torch.float32)
    with torch.autocast(main_BV.device.type, enabled=False):
        scores, rows = _eager(main_BV.to(sums), contrast_BV.to(sums), alpha, margin, banded, swapped)
    return scores.to(main_BV.dtype), rows


@_constrained.register_fake
def _(
    main_BV: torch.Tensor, contrast_BV: torch.Tensor, alpha: float, margin: float, banded: bool, swapped: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    sums = torch.promote_types(main_BV.dtype, torch.float32)
    return main_BV.new_empty(main_BV.shape), main_BV.new_empty(5, len(main_BV), dtype=sums)


def _eager(
    main: torch.Tensor, contrast: torch.Tensor, alpha: float, margin: float, banded: bool, swapped: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    main_normaliser, _ = _normaliser(main, moment=False)
    contrast_normaliser, entropy = _normaliser(contrast, moment=True)
    if banded:
        middle = main_normaliser - entropy
        above, below = middle + margin, middle - margin
    else:
        above, below = ratio_bounds(main, margin)
    likely, unlikely = violating(main, above, below, banded=banded)
    ruled_out = contrast == -torch.inf
    least = contrast.masked_fill(ruled_out, torch.inf).amin(1, keepdim=True)
    prior = torch.where(ruled_out, least, contrast).sub_(contrast_normaliser[:, None])
    gain = (main - main_normaliser[:, None]).sub_(prior)
    inside, outside = (alpha - 1.0, alpha) if swapped else (alpha, alpha - 1.0)
    violates = likely.logical_or_(unlikely)
    tau = torch.where(violates, main.new_tensor(inside), main.new_tensor(outside))
    scores = torch.where(tau == 0, main, gain.mul_(tau).add_(main))
    scores.masked_fill_((main == -torch.inf) | ruled_out.logical_and_(tau < 0), -torch.inf)
    return scores, torch.stack([main_normaliser, contrast_normaliser, entropy, above, below])


def _normaliser(logits: torch.Tensor, *, moment: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-sum-exp and, with ``moment``, the entropy of every row."""
    largest = logits.amax(1, keepdim=True)
    shifted = logits - largest.masked_fill(largest == -torch.inf, 0.0)
    if not moment:
        return largest.squeeze(1) + shifted.exp_().sum(1).log(), shifted
    # Nothing times -inf is nothing here.
    raised = shifted.clamp_min_(FLOOR).exp()
    total = raised.sum(1)
    log_total = total.log()
    return largest.squeeze(1) + log_total, log_total - torch.linalg.vecdot(raised, shifted) / total
