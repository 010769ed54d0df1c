"""What was saved: how many layers each position had."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from graftwork_d3.flops import Cost
from graftwork_d3.policies import Plan


@dataclass
class DepthReport:
    """Decode passes by step (1, 2, ...), over all batches that were decoded."""

    plan: Plan
    passes: Counter[int] = field(default_factory=Counter)

    def count(self, step: int) -> None:
        """Note one pass."""
        self.passes[step] += 1

    def add(self, other: DepthReport) -> None:
        """Take in the passes of another report of the same plan."""
        self.passes.update(other.passes)

    def layers_at(self, step: int) -> int:
        """Return the number of layers of a step."""
        return self.plan.layers - len(self.plan.skipped(step))

    @property
    def layers_per_position(self) -> list[int]:
        """The number of layers of steps 1, 2, ... as far as texts went."""
        return [self.layers_at(step) for step in range(1, max(self.passes, default=0) + 1)]

    @property
    def mean_ratio(self) -> float:
        """Mean share (0 to 1) of the layers that a generated token went through; 1 where none was decoded."""
        if not self.passes:
            return 1.0
        used = sum(count * self.layers_at(step) for step, count in self.passes.items())
        return used / (self.plan.layers * self.passes.total())

    def as_json(self, cost: Cost) -> dict[str, Any]:
        """Return the figures for people: layers, share of the arithmetic saved, the most it can speed up."""
        return {
            "passes": self.passes.total(),
            "layers": self.plan.layers,
            "layers_per_position": self.layers_per_position,
            "mean_depth_ratio": self.mean_ratio,
            "operations_saved": cost.saved(self.mean_ratio),
            "speedup_bound": cost.bound(self.mean_ratio),
        }
