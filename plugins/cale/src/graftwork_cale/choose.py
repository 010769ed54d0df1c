"""Choose the layer, and how much it is strengthened.

Unsupervised: by S(l), the divergence that the context makes in layer l (:mod:`graftwork_cale.measure`). The
criterion is the paper's idea; its form is ours. Supervised: by the score of every setting on labelled items.
The setting that changes nothing always takes part, and wins ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from graftwork import UserError

Criterion = Literal["growth", "peak", "supervised"]
STRENGTHS = (1.05, 1.1, 1.25, 1.5, 2.0)


class Setting(NamedTuple):
    """A layer (1 to L-1) and its strength."""

    layer: int | None
    strength: float


NEUTRAL = Setting(None, 1.0)


def candidates(count: int) -> range:
    """Return the layers to choose from in a model of ``count``: not the first quarter, not the last one.

    Raises:
        UserError: there are none.
    """
    found = range(count // 4 + 1, count)
    if not found:
        raise UserError(f"a model of {count} layer has none that can be enhanced; it needs two at least")
    return found


def by_divergence(kl: Sequence[float], criterion: Literal["growth", "peak"]) -> int:
    """Return the candidate with the steepest rise S(l) - S(l-1), or the largest S(l); the first of equals.

    ``kl[l - 1]`` is S(l). S(0) is 0: before the first layer both prompts end with the same token.
    """
    steps = [0.0, *kl]
    value = (lambda layer: steps[layer] - steps[layer - 1]) if criterion == "growth" else steps.__getitem__
    return max(candidates(len(kl)), key=value)


def settings(layers: Sequence[int], strengths: Sequence[float]) -> list[Setting]:
    """Return all pairs, after the one that changes nothing."""
    return [
        NEUTRAL,
        *(Setting(layer, strength) for layer in layers for strength in strengths if strength != 1),
    ]


def best(scores: Mapping[Setting, float]) -> Setting:
    """Return the setting of the best score; of equal ones the neutral, the mildest, the lowest.

    ``scores`` holds :data:`NEUTRAL`.
    """
    order = sorted(scores, key=lambda one: (abs(one.strength - 1), one.layer or 0))
    return max(order, key=lambda one: scores[one]) if scores[NEUTRAL] < max(scores.values()) else NEUTRAL
