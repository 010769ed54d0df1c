"""A diagonal on the inputs of a place (``place: input`` and ``both``): ``x / e``, and ``e`` in the weights.

It is folded into the norm or the linear before. A per-row scale of that linear takes up the factor of its row, so how
it is rounded does not depend on ``e``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from graftwork.transform.structure import Place

from graftwork_dam.adhesive import ALPHAS, normalised, parse_init, smooth_split
from graftwork_dam.choose import Problem, total_loss
from graftwork_dam.learn import learn
from graftwork_dam.rounder import Rounder


@dataclass(frozen=True)
class InputChoice:
    """The diagonal of a place, and those between the factors of its linears.

    Attributes:
        source: logarithm of ``e`` per output channel of what makes the inputs.
        log_e: the same per input.
        logs: ``log_d`` of every linear.
        name: of the start, ``learned`` where learning bettered it.
        loss, start: sums over the linears, with the weights as they are stored.
    """

    source: torch.Tensor
    log_e: torch.Tensor
    logs: list[torch.Tensor]
    name: str
    loss: float
    start: float
    finite: bool = True


def input_starts(init: str, place: Place, problems: Sequence[Problem]) -> dict[str, torch.Tensor]:
    """Return candidates for ``source``: none (all 1), and SmoothQuant's ``max|x|^alpha / max|W|^(1-alpha)``."""
    x = problems[0].layer.sample.abs().amax(0)
    weights = torch.stack([problem.layer.weight.abs().amax(0) for problem in problems]).amax(0)
    kind, exponent = parse_init(init)
    alphas = (exponent,) if kind == "smoothquant" else ALPHAS
    found = {
        f"smoothquant{alpha:g}": normalised(place.gathered(smooth_split(x, weights, alpha)))
        for alpha in alphas
    }
    if kind != "smoothquant":
        found["none"] = torch.zeros_like(next(iter(found.values())))
    return found


def choose_inputs(
    place: Place,
    problems: Sequence[Problem],
    logs: Sequence[torch.Tensor],
    init: str,
    rounder: Rounder,
    *,
    steps: int,
    lr: float,
    both: bool,
) -> InputChoice:
    """Return the diagonal on the inputs of a place; with ``both`` it is learned together with those in between."""
    starts = input_starts(init, place, problems)
    logs = list(logs)
    with torch.no_grad():
        losses = {name: float(total_loss(problems, logs, place.spread(one))) for name, one in starts.items()}
    name = min(losses, key=lambda one: losses[one])
    judge = rounder.judge

    def stored(ds: Sequence[torch.Tensor], source: torch.Tensor) -> float:
        log_e = place.spread(source)
        return sum(p.stored_loss(d, judge, log_e) for p, d in zip(problems, ds, strict=True))

    source = starts[name]
    start = stored(logs, source)
    if not steps:
        return InputChoice(source, place.spread(source), logs, name, start, start)

    def loss(found: Sequence[torch.Tensor]) -> torch.Tensor:
        ds = found[1:] if both else logs
        return total_loss(problems, ds, place.spread(found[0]))

    learned = learn(loss, [source, *(logs if both else ())], steps=steps, lr=lr)
    ds = learned.logs[1:] if both else logs
    found = stored(ds, learned.logs[0])
    if found < start:
        source = learned.logs[0]
        return InputChoice(source, place.spread(source), ds, "learned", found, start, learned.finite)
    return InputChoice(source, place.spread(source), logs, name, start, start, learned.finite)
