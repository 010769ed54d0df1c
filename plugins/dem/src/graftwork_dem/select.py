"""The places of an edit: from scores to Omega and its weights pi. All of it is ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from graftwork.edit.errors import LocalizationError
from graftwork.edit.sites import KINDS, Kind

Place = tuple[int, Kind]
"""A layer and the kind of its site."""
Weights = Literal["scores", "uniform"]


def default_deepest(layers: int) -> int:
    """Return l_max = floor(0.6 L), the deepest layer that is written to."""
    return min(layers - 1, int(0.6 * layers))


def select(
    scores: torch.Tensor,
    *,
    n_sites: int,
    min_attn: int = 0,
    min_mlp: int = 0,
    deepest: int | None = None,
    weights: Weights = "scores",
    where: str = "the request",
) -> dict[Place, float]:
    """Return the places with the highest positive scores and their weights, which add up to 1, by depth.

    At least ``min_attn`` and ``min_mlp`` of each kind are taken as far as there are positive ones; never more than
    ``n_sites``, and fewer where fewer are positive: a place that speaks against the target is never written to.
    Equal scores are taken from the shallowest on.

    Raises:
        LocalizationError: no positive score up to the deepest layer, or a score that is no number.
    """
    if not bool(torch.isfinite(scores).all()):
        raise LocalizationError(
            f"{where}: a score is no number (NaN or infinity); look at the model's weights"
        )
    deepest = default_deepest(len(scores)) if deepest is None else min(deepest, len(scores) - 1)
    known: list[tuple[float, int, int]] = [
        (-float(scores[layer, kind]), layer, kind)
        for layer in range(deepest + 1)
        for kind in range(len(KINDS))
        if float(scores[layer, kind]) > 0
    ]
    if not known:
        raise LocalizationError(
            f"{where}: no site of the layers 0 to {deepest} has a positive score; take more layers (l_max), another "
            f"mode, or leave the edit out"
        )
    known.sort()
    chosen = [one for number, least in enumerate((min_attn, min_mlp)) for one in _of(known, number)[:least]]
    chosen += [one for one in known if one not in chosen][: max(0, n_sites - len(chosen))]
    total = -sum(score for score, _, _ in chosen)
    return {
        (layer, KINDS[kind]): 1 / len(chosen) if weights == "uniform" else -score / total
        for score, layer, kind in sorted(chosen, key=lambda one: one[1:])
    }


def _of(known: Sequence[tuple[float, int, int]], kind: int) -> list[tuple[float, int, int]]:
    return [one for one in known if one[2] == kind]


def parse_place(text: str) -> Place:
    """Return the place that ``mlp.3`` or ``attn.7`` means. Raises ValueError where it means none."""
    kind, _, layer = text.strip().partition(".")
    if kind not in KINDS or not layer.isdecimal():
        raise ValueError(f"'{text}' is no site; write attn.<layer> or mlp.<layer>, such as mlp.3")
    return int(layer), kind  # type: ignore[return-value]


def remaining_share(weights: Mapping[Place, float], place: Place) -> float:
    """Return pi of ``place`` over the sum of pi of it and all deeper places: the share of what is still to move."""
    order = (place[0], KINDS.index(place[1]))
    rest = sum(pi for (layer, kind), pi in weights.items() if (layer, KINDS.index(kind)) >= order)
    return weights[place] / rest
