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

    def sentence(self, cost: Cost) -> str:
        """Return the figures in words, runs of positions with the same number of layers put together."""
        depths = self.layers_per_position
        if not depths:
            return "no token was decoded after the prompt, so no layer was left out"
        starts = [k for k, depth in enumerate(depths) if k == 0 or depths[k - 1] != depth]
        ends = [*(k - 1 for k in starts[1:]), len(depths) - 1]
        shown = [
            f"{depths[a]} at position {a + 1}" + (f" to {b + 1}" if b > a else "")
            for a, b in zip(starts, ends, strict=True)
        ]
        if len(shown) > 6:
            shown = [*shown[:3], "...", *shown[-2:]]
        return (
            f"of {self.plan.layers} layers, {', '.join(shown)}; on average {100 * self.mean_ratio:.1f} %, which saves "
            f"{100 * cost.saved(self.mean_ratio):.1f} % of the arithmetic and allows at most "
            f"{cost.bound(self.mean_ratio):.2f} times the speed"
        )

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
