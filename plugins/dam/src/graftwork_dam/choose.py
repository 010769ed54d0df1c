"""Which diagonal a linear gets: the best start, then what learning makes of it, then what rounds best in truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from graftwork_dam.adhesive import candidates, normalised, power_split
from graftwork_dam.factor import Factors
from graftwork_dam.forward import Rounding, adhered_output, product_output, relative_loss
from graftwork_dam.layer import Layer
from graftwork_dam.learn import learn
from graftwork_dam.rounder import Rounder, values


@dataclass(frozen=True)
class Choice:
    """A chosen diagonal.

    Attributes:
        log_d: its logarithm (r), normalised.
        name: of the start, ``learned`` where learning bettered it.
        loss: relative squared error of the outputs with the weights as they are stored.
        start: the same of the start; never less than ``loss``.
        finite: whether learning met numbers only.
    """

    log_d: torch.Tensor
    name: str
    loss: float
    start: float
    finite: bool = True


class Problem:
    """The outputs of one linear on calibration inputs, and how near its rounded factors come.

    ``layer`` says which inputs; ``factors`` are of the weight itself or, where the order says so, of its rounded form;
    the target is always the output of the weight itself.
    """

    def __init__(self, layer: Layer, factors: Factors, rounding: Rounding) -> None:
        self.layer, self.rounding = layer, rounding
        self.factors = factors.to(layer.weight.dtype)
        self.x = layer.rows(rounding.of_tokens)
        self.target = self.x @ layer.weight.T

    def starts(self, init: str) -> dict[str, torch.Tensor]:
        """Return the diagonals that ``init`` names; see :func:`graftwork_dam.adhesive.candidates`."""
        latent = (self.layer.sample @ self.factors.scaled.T).abs().amax(0)
        column = self.factors.left.abs().amax(0)
        return candidates(init, self.factors.values, latent, column)

    def textbook(self) -> torch.Tensor:
        """Return SVD-LLM's split, ``S^(1/2)`` for both factors."""
        return normalised(power_split(self.factors.values, 0.5))

    def loss(self, log_d: torch.Tensor, log_e: torch.Tensor | None = None) -> torch.Tensor:
        """Return the relative squared error of the outputs, with rounding to the nearest and gradients."""
        return relative_loss(adhered_output(self.x, self.factors, log_d, self.rounding, log_e), self.target)

    @torch.no_grad()
    def stored_loss(self, log_d: torch.Tensor, rounder: Rounder, log_e: torch.Tensor | None = None) -> float:
        """Return the same with the factors as ``rounder`` would store them."""
        moments, scale = self.layer.moments, None
        left, right = self.factors.split(log_d)
        if log_e is not None:
            scale, right = (-log_e).exp(), right * log_e.exp()
            moments = scaled_moments(moments, log_e)
        stored = rounder.pair(left, right, moments, self.layer.name)
        found = product_output(self.x, values(stored[0]), values(stored[1]), self.rounding, scale)
        return float(relative_loss(found, self.target))

    @torch.no_grad()
    def best(self, starts: Mapping[str, torch.Tensor]) -> str:
        """Return the name of the start with the least loss."""
        losses = {name: float(self.loss(log_d)) for name, log_d in starts.items()}
        return min(losses, key=lambda name: losses[name])


def choose(problem: Problem, init: str, rounder: Rounder, *, steps: int, lr: float) -> Choice:
    """Return the diagonal of one linear: the best start, or what ``steps`` of learning make of it.

    Learning rounds to the nearest. What it found is taken only where the factors as ``rounder`` stores them are
    nearer to the target than from the start.
    """
    starts = problem.starts(init)
    name = problem.best(starts)
    judge = rounder.judge
    start = problem.stored_loss(starts[name], judge)
    if not steps:
        return Choice(starts[name], name, start, start)
    learned = learn(lambda logs: problem.loss(logs[0]), [starts[name]], steps=steps, lr=lr)
    (log_d,) = learned.logs
    found = problem.stored_loss(log_d, judge)
    if found < start:
        return Choice(log_d, "learned", found, start, learned.finite)
    return Choice(starts[name], name, start, start, learned.finite)


def scaled_moments(moments: torch.Tensor, log_e: torch.Tensor) -> torch.Tensor:
    """Return the second moments of ``x / e`` from those of ``x``."""
    inverse = (-log_e).exp().to(moments)
    return moments * inverse[:, None] * inverse


def total_loss(
    problems: Sequence[Problem], logs: Sequence[torch.Tensor], log_e: torch.Tensor
) -> torch.Tensor:
    """Return the sum of the losses of linears that read the same inputs, divided by ``e``."""
    losses = [problem.loss(log_d, log_e) for problem, log_d in zip(problems, logs, strict=True)]
    return torch.stack(losses).sum()
