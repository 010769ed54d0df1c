"""Learning the diagonals of a decoder layer together, by the output of that layer (``loss: block``)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graftwork.transform.block import Block
from graftwork.transform.structure import first_tensor
from torch import nn

from graftwork_dam.choose import Problem
from graftwork_dam.forward import adhered_output
from graftwork_dam.learn import learn
from graftwork_dam.options import LearnOptions


@dataclass(frozen=True)
class Together:
    """What came of it: the diagonals by linear, and the relative squared error of the layer's output as stored."""

    logs: dict[str, torch.Tensor]
    loss: float
    start: float
    finite: bool

    @property
    def better(self) -> bool:
        return self.loss < self.start


class _Adhered(nn.Module):
    """Stands in the place of a linear while the diagonal between its factors is learned."""

    def __init__(self, linear: Any, problem: Problem) -> None:
        super().__init__()
        self.problem, self.bias = problem, linear.bias
        # In a tuple, so that its weight is none of ours.
        self._rotation = (getattr(linear, "rotation", None),)
        self.log_d = torch.zeros(problem.factors.rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (rotation,) = self._rotation
        seen = x if rotation is None else rotation(x)
        y = adhered_output(seen.to(self.log_d.dtype), self.problem.factors, self.log_d, self.problem.rounding)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def learn_together(
    block: Block,
    problems: Mapping[str, Problem],
    start: Mapping[str, torch.Tensor],
    options: LearnOptions,
    stored: Callable[[Mapping[str, torch.Tensor]], nn.Module],
) -> Together:
    """Return the diagonals that bring the layer's output next to that of the unchanged layer on the same inputs.

    ``stored`` makes the layer with its factors as they are stored; learning rounds to the nearest. The layer of
    ``block`` is left as it is.
    """
    inputs = _windows(block, options.tokens)
    with torch.no_grad():
        targets = [block.run(hidden, kwargs) for hidden, kwargs in inputs]
    energy = sum(float(target.double().square().sum()) for target in targets)
    trial = copy.deepcopy(block.module)
    trial.requires_grad_(False)
    places: dict[str, _Adhered] = {}
    for name, problem in problems.items():
        parent, _, last = name.rpartition(".")
        places[name] = _Adhered(trial.get_submodule(name), problem)
        setattr(trial.get_submodule(parent), last, places[name])

    def error(module: nn.Module) -> torch.Tensor:
        parts = [
            (first_tensor(module(hidden, **kwargs)).float() - target.float()).square().sum()
            for (hidden, kwargs), target in zip(inputs, targets, strict=True)
        ]
        return torch.stack(parts).sum() / energy

    def loss(logs: Sequence[torch.Tensor]) -> torch.Tensor:
        for place, log_d in zip(places.values(), logs, strict=True):
            place.log_d = log_d
        return error(trial)

    learned = learn(loss, [start[name] for name in places], steps=options.steps, lr=options.lr)
    logs = dict(zip(places, learned.logs, strict=True))
    with torch.no_grad():
        return Together(logs, float(error(stored(logs))), float(error(stored(start))), learned.finite)


def _windows(block: Block, tokens: int) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Return the first inputs of the layer, whole batches, until they hold ``tokens`` tokens."""
    found, count = [], 0
    for hidden, kwargs in block.batches():
        found.append((hidden, kwargs))
        count += hidden.shape[0] * hidden.shape[1]
        if count >= tokens:
            break
    return found
