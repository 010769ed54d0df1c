"""COIECD's decisions and scores as functions of two streams of logits.

Notation: z2 (``main``) and z1 (``contrast``) are the logits with and without the context, l2 and l1 their
log-probabilities, p2 and p1 the probabilities, all B x V; g = l2 - l1. Every decision is one row's own.

The method (Yuan et al., Findings of ACL 2024, and its official code): the information of a token under the
context, ``-l2``, minus the entropy H1 of the distribution without it, is normalised over the vocabulary; tokens
far from the bounds of that are *violating*. A violating token is scored ``l2 + alpha g``, any other
``l1 + alpha g``. Both are ``l2 + (alpha - 1 + v) g`` with v in {0, 1}, so we add to z2 itself, which differs by
a constant of the row: where nothing is added, what comes out is z2 bit for bit.

H1 is one number per row, and a normalisation takes it out. What is left of the bounds is (ours)::

    lower violation  <=>  p2(y) > max p2 / ratio       the plausible tokens
    upper violation  <=>  p2(y) < ratio * min p2       the bottom of the tail
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from graftwork.generate.contrast import check_distributions, check_left
from graftwork_kernels.constrained_logits import (
    Constrained,
    constrained_logits,
    ratio_bounds,
    violating,
)

Constraint = Literal["softmax", "band"]
LOWER, UPPER, CONFORMING = "violating: likely", "violating: unlikely", "conforming"
Sets = tuple[torch.Tensor, torch.Tensor]


def bounds(main: torch.Tensor, ratio: float) -> Sets:
    """Return the tokens (bool B x V) beyond the lower and beyond the upper bound; ``ratio`` >= 1, or inf.

    A row with exactly one token beyond the lower bound has none (official code, which looks at the batch's
    first row only; here every row for itself). Tokens that are -inf are in neither set.
    """
    return violating(main, *ratio_bounds(main, math.log(ratio)), banded=False)


def band(main: torch.Tensor, contrast: torch.Tensor, gamma: float) -> Sets:
    """Return the tokens (bool B x V) whose information is ``gamma`` nats or more below, and above, H1.

    Ours, after the paper's proposition as its readers give it: a token without conflict keeps
    ``|-l2 - H1| < gamma``. Here the entropy matters.
    """
    found = _checked(constrained_logits(main, contrast, gamma=gamma))
    lower, upper = violating(main, found.above, found.below, banded=True)
    return lower, upper & ~lower


def _checked(found: Constrained) -> Constrained:
    check_distributions(found.main_normaliser, found.contrast_normaliser)
    return found


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    """Return the entropy of every row in nats, B x 1; what cannot happen adds nothing."""
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1, keepdim=True)


@dataclass(frozen=True)
class Coiecd:
    """The scores of one setting; see the module's docstring.

    ``constraint``: ``softmax`` (with ``ratio``, the code's 1 / lambda) or ``band`` (with ``gamma``, nats).
    ``swapped`` gives violating tokens the distribution without the context as base and the others that with
    it: the assignment turned round, a negative control.
    """

    alpha: float = 1.0
    ratio: float = 4.0
    constraint: Constraint = "softmax"
    gamma: float = 1.0
    swapped: bool = False

    def sets(self, main: torch.Tensor, contrast: torch.Tensor) -> Sets:
        """Return the violating tokens, likely and unlikely ones apart, bool B x V each."""
        return bounds(main, self.ratio) if self.constraint == "softmax" else band(main, contrast, self.gamma)

    def scores(self, main: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
        """Return scores on the scale of ``main``, B x V.

        Raises:
            UserError: see :func:`graftwork.generate.contrast.check_distributions` and ``check_left``.
        """
        gamma = None if self.constraint == "softmax" else self.gamma
        found = constrained_logits(
            main, contrast, alpha=self.alpha, ratio=self.ratio, gamma=gamma, swapped=self.swapped
        )
        return check_left(_checked(found).scores)

    def explain(self, main: torch.Tensor, contrast: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Return which set every token is in, bool B x V each; a token may be in both violating ones."""
        lower, upper = self.sets(main, contrast)
        return {LOWER: lower, UPPER: upper, CONFORMING: ~(lower | upper)}
