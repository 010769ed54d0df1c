"""Other ways to leave out as many layers, to compare with. Only nested ones can be decoded with; all can be scored.

Depths per step are those of a given schedule unless said otherwise, so that budgets are equal.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from graftwork_d3.schedule import DepthSchedule


@dataclass(frozen=True)
class SkipTable:
    """``sets[t - 1]`` is left out at step t; the last one also after the end. Step 0 leaves out nothing."""

    layers: int
    sets: tuple[frozenset[int], ...]

    def skipped(self, step: int) -> frozenset[int]:
        """Return the layers that step t leaves out."""
        return self.sets[min(step, len(self.sets)) - 1] if step > 0 and self.sets else frozenset()

    @cached_property
    def removable(self) -> frozenset[int]:
        return frozenset().union(*self.sets)

    @cached_property
    def nested(self) -> bool:
        """Whether no layer comes back after it was left out, so that none lacks keys."""
        return all(before <= after for before, after in zip(self.sets, self.sets[1:], strict=False))


Plan = DepthSchedule | SkipTable
"""Which layers each step leaves out."""


def _in_order(schedule: DepthSchedule, order: Sequence[int], steps: int) -> SkipTable:
    return SkipTable(
        schedule.layers,
        tuple(frozenset(order[: schedule.layers - schedule.depth(step)]) for step in range(1, steps + 1)),
    )


def early_exit(schedule: DepthSchedule, steps: int) -> SkipTable:
    """Leave out the last layers."""
    return _in_order(schedule, range(schedule.layers - 1, 0, -1), steps)


def late_start(schedule: DepthSchedule, steps: int) -> SkipTable:
    """Leave out the layers after layer 0, which stays because it carries the cache's length."""
    return _in_order(schedule, range(1, schedule.layers), steps)


def random_order(schedule: DepthSchedule, steps: int, seed: int) -> SkipTable:
    """Let layers leave in an order drawn once; layer 0 and the tail stay."""
    order = list(range(1, schedule.layers - schedule.tail))
    random.Random(seed).shuffle(order)
    return _in_order(schedule, order, steps)


def even(schedule: DepthSchedule, steps: int) -> SkipTable:
    """Keep layers at even distances, the first and the last among them. Not nested."""
    last = schedule.layers - 1
    sets: list[frozenset[int]] = []
    for step in range(1, steps + 1):
        count = schedule.depth(step)
        kept = {round(place * last / (count - 1)) for place in range(count)}
        sets.append(frozenset(range(schedule.layers)) - kept)
    return SkipTable(schedule.layers, tuple(sets))


def constant(schedule: DepthSchedule, steps: int, depth: int) -> SkipTable:
    """Leave out the schedule's own first layers, as many at every step: ``depth`` stay."""
    return SkipTable(schedule.layers, (frozenset(schedule.leaving[: schedule.layers - depth]),) * steps)


def reversed_steps(schedule: DepthSchedule, steps: int) -> SkipTable:
    """Give step t what the schedule gives step ``steps + 1 - t``. Not nested."""
    return SkipTable(schedule.layers, tuple(schedule.skipped(step) for step in range(steps, 0, -1)))
