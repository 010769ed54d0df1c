"""The task-region mapping: which neurons form a task's core, and whether they are specialised. Equation (2).

    R~_t[i, j] = R_t[i, j] / sum_j R_t[i, j]         p_s[j] = R~_s[j] / sum over s' <= t of R~_s'[j]
    H[j]       = - sum over s <= t of p_s log p_s / log(number of tasks so far)

That there are specialised and generalist neurons is in the abstract; the entropy that tells them apart is ours.
Pure functions of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from graftwork import UserError


@dataclass(frozen=True)
class Region:
    """A task's core in one layer.

    ``core`` (n, ascending) are neurons, ``generalist`` (n) says which of them are, ``entropy`` (m) is H.
    """

    core: torch.Tensor
    generalist: torch.Tensor
    entropy: torch.Tensor


def normalised(relevance: torch.Tensor) -> torch.Tensor:
    """Return R~ (m): shares of the layer's relevance."""
    return relevance / relevance.sum()


def entropy(shares: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return H (m) in [0, 1] of a layer's R~ of all tasks so far; 0 with one task, and for what no task needs."""
    stacked = torch.stack([share.double() for share in shares])
    if len(stacked) == 1:
        return torch.zeros_like(stacked[0])
    p = stacked / stacked.sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return (torch.special.entr(p).sum(0) / torch.tensor(float(len(stacked))).double().log()).clamp(0, 1)


def core_size(density: float, neurons: int) -> int:
    """Return how many of ``neurons`` a core of this density has, rounded down."""
    return int(density * neurons + 1e-9)


def map_regions(
    shares: Mapping[str, torch.Tensor],
    history: Sequence[Mapping[str, torch.Tensor]],
    *,
    density: float,
    h: float,
    select: Literal["layer", "global"] = "layer",
    generalist: Literal["project", "freeze"] = "project",
    used: Mapping[str, torch.Tensor] | None = None,
    budget: float = 1.0,
    exhausted: Literal["stop", "share"] = "stop",
    generator: torch.Generator | None = None,
    task: str = "",
) -> dict[str, Region]:
    """Return the region of a task in every layer.

    ``shares`` are the layers' R~ (m) of this task, ``history`` those of earlier ones. ``used`` (m, booleans) are the
    neurons of earlier cores. With a ``generator`` the core is drawn at random instead of by relevance, in equal number.

    Raises:
        UserError: the cores would use more than ``budget`` of a layer and ``exhausted`` is "stop"; or every
            neuron is generalist and frozen.
    """
    entropies = {name: entropy([past[name] for past in history] + [own]) for name, own in shares.items()}
    scores = {}
    for name, own in shares.items():
        score = own.double() if generator is None else torch.rand(len(own), generator=generator).double()
        if generalist == "freeze":
            score = score.masked_fill(entropies[name] >= h, -torch.inf)
        scores[name] = score
    counts = _counts(scores, density, select)
    regions = {}
    for name, score in scores.items():
        ranking = torch.argsort(score, descending=True, stable=True)
        ranking = ranking[torch.isfinite(score[ranking])]
        core = ranking[: counts[name]]
        if used is not None:
            core = _within_budget(core, ranking, used[name], budget, exhausted, name, task)
        core = core.sort().values
        regions[name] = Region(core, entropies[name][core] >= h, entropies[name])
    if not any(len(region.core) for region in regions.values()):
        raise UserError(
            f"task '{task}': every neuron is generalist (H >= {h}), so none may be trained; raise plugins.parsp.h or "
            f"set plugins.parsp.generalist: project"
        )
    return regions


def _counts(scores: Mapping[str, torch.Tensor], density: float, select: str) -> dict[str, int]:
    sizes = {name: core_size(density, len(score)) for name, score in scores.items()}
    if select == "layer":
        return sizes
    everything = torch.cat(list(scores.values()))
    best = torch.argsort(everything, descending=True, stable=True)[: sum(sizes.values())]
    owners = torch.repeat_interleave(torch.tensor([len(score) for score in scores.values()]))
    chosen = torch.bincount(owners[best], minlength=len(scores))
    return dict(zip(scores, chosen.tolist(), strict=True))


def _within_budget(
    core: torch.Tensor,
    ranking: torch.Tensor,
    used: torch.Tensor,
    budget: float,
    exhausted: str,
    layer: str,
    task: str,
) -> torch.Tensor:
    """Return ``core`` if it fits, else (share) the best new neurons that fit, filled up with used ones."""
    room = core_size(budget, len(used)) - int(used.sum())
    new = int((~used[core]).sum())
    if new <= room:
        return core
    if exhausted == "stop":
        raise UserError(
            f"task '{task}' needs {new} new neurons in '{layer}', and plugins.parsp.budget = {budget:g} leaves {room}; "
            f"raise it, lower plugins.parsp.density, or set plugins.parsp.exhausted: share"
        )
    fresh = ~used[ranking]
    allowed = ~fresh | (fresh.cumsum(0) <= room)
    return ranking[allowed][: len(core)]
