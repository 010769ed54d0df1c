"""How far a method's next-token distributions are from the full model's, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from graftwork_d3.policies import Plan
from graftwork_d3.score import teacher_forced
from graftwork_d3.texts import Scored


@dataclass(frozen=True)
class Distance:
    """One value per step 1, 2, ...: the token of step 0 comes from the prompt's pass and is the same.

    ``kl``: KL(full || method) in nats. ``agree``: whether both put the same token first. ``nll``: of the answer's
    token under the method, in nats.
    """

    kl: torch.Tensor
    agree: torch.Tensor
    nll: torch.Tensor


class FullModel:
    """The full model's distributions over one item; ``distance`` compares a plan with it.

    An item of fewer than two tokens has no step to compare.
    """

    def __init__(self, model: Any, item: Scored) -> None:
        self.model = model
        self.item = item
        # The last token of the answer is predicted, not read.
        self.ids = torch.tensor([item.prompt + item.answer[:-1]], device=model.device)
        self.targets = torch.tensor(item.answer[1:], device=model.device)
        self.logp = self._logp(None)

    @property
    def steps(self) -> int:
        return len(self.targets)

    def _logp(self, plan: Plan | None) -> torch.Tensor:
        logits = teacher_forced(self.model, self.ids, len(self.item.prompt), plan)
        return logits[0, 1:].float().log_softmax(-1)

    def distance(self, plan: Plan | None = None) -> Distance:
        """Return the distance of ``plan`` from the full model (without one: of the full model from itself)."""
        logp = self.logp if plan is None else self._logp(plan)
        return Distance(
            (self.logp.exp() * (self.logp - logp)).sum(-1).clamp(min=0).cpu(),
            (self.logp.argmax(-1) == logp.argmax(-1)).float().cpu(),
            -logp.gather(-1, self.targets[:, None])[:, 0].cpu(),
        )

    def entropy(self) -> torch.Tensor:
        """Return the entropy of the full model's distribution at every step, in nats."""
        return -(self.logp.exp() * self.logp).sum(-1).cpu()


def binned(values: list[torch.Tensor], width: int) -> list[tuple[float, float]]:
    """Return (middle step, mean over all items) for every bin of ``width`` steps. ``values``: one per item."""
    longest = max(len(one) for one in values)
    points: list[tuple[float, float]] = []
    for begin in range(0, longest, width):
        inside = torch.cat([one[begin : begin + width] for one in values])
        points.append((begin + 1 + (min(width, longest - begin) - 1) / 2, float(inside.mean())))
    return points
