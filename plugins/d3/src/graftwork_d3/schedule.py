"""Which layers a step runs: the decay, the order in which layers leave, and the decay that meets a budget.

Steps are forward passes after the prompt's: step t = 1, 2, ... reads generated token t - 1 and predicts token t.
Step 0 is the prompt, which all layers read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from graftwork import UserError

Order = Literal["from_start", "from_end", "spread"]
ORDERS = ("from_start", "from_end", "spread")
# Against 31.999999 where the product is 32.
_GUARD = 1e-9
EXPECTED_TOKENS = 256


@dataclass(frozen=True)
class DepthSchedule:
    """``n_t = clip(floor(layers * alpha^t), minimum, layers)`` layers at step t (the paper's abstract).

    The first ``start`` and the last ``tail`` layers always run. Those between leave in ``order``: the block grows
    from its ``start``, or from its end, or ``spread`` out, or in the order of the layer numbers given. Sets of
    layers of later steps are inside those of earlier ones, whatever the order, so no layer that runs lacks keys.

    ``levels``: the number of different depths, evenly spaced from ``layers`` to ``minimum``; n_t is moved to the
    nearest, upwards when halfway (ours, for compilers: each depth is a graph of its own).

    Raises:
        UserError: a value is out of bounds; the sentence has the value and the bounds.
    """

    layers: int
    alpha: float
    start: int
    tail: int
    minimum: int
    order: Order | tuple[int, ...] = "from_start"
    levels: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise UserError(f"alpha = {self.alpha} is not in (0, 1]; 1 keeps all layers")
        if self.start < 1 or self.tail < 1 or self.start + self.tail > self.layers:
            raise UserError(
                f"flex start {self.start} and tail {self.tail} do not fit a model of {self.layers} layers: both are "
                f"at least 1 (layer 0 carries the cache's length) and together at most {self.layers}"
            )
        if not self.start + self.tail <= self.minimum <= self.layers:
            raise UserError(
                f"minimum = {self.minimum} layers is not between flex start + tail = {self.start + self.tail} and the "
                f"model's {self.layers}"
            )
        if self.levels is not None and self.levels < 2:
            raise UserError(f"levels = {self.levels}; two depths are the fewest: all layers and the minimum")
        if isinstance(self.order, tuple):
            self._check_order(self.order)
        elif self.order not in ORDERS:
            raise UserError(f"order '{self.order}' is none of {', '.join(ORDERS)}, nor a list of layers")

    def _check_order(self, order: tuple[int, ...]) -> None:
        wrong = [layer for layer in order if not self.start <= layer < self.layers - self.tail]
        if wrong:
            raise UserError(
                f"order names layer {wrong[0]}, which is not between the flex start {self.start} and the tail, "
                f"which begins at {self.layers - self.tail}"
            )
        if len(set(order)) < len(order):
            twice = next(layer for layer in order if order.count(layer) > 1)
            raise UserError(f"order names layer {twice} twice; a layer leaves once")
        if len(order) < self.layers - self.minimum:
            raise UserError(
                f"order names {len(order)} layers, but down to a minimum of {self.minimum} layers "
                f"{self.layers - self.minimum} leave; name more, or raise the minimum"
            )

    @classmethod
    def of(
        cls,
        layers: int,
        *,
        alpha: float | None = None,
        target_ratio: float | None = None,
        expected_tokens: int | Sequence[float] = EXPECTED_TOKENS,
        start: int | None = None,
        tail: int | None = None,
        minimum: int | None = None,
        order: Order | Sequence[int] = "from_start",
        levels: int | None = None,
    ) -> DepthSchedule:
        """Return a schedule from a decay, or from a budget: mean depth over ``expected_tokens`` steps.

        ``target_ratio``: mean of n_t / layers. ``expected_tokens``: the number of steps, or how much each step
        counts (such as the number of texts that are that long). What is left out is a quarter of the layers at the
        start, two at the end, and at least half of them at any step (ours).

        Raises:
            UserError: none or both of alpha and target_ratio, a budget that cannot be met, a value out of bounds.
        """
        if (alpha is None) == (target_ratio is None):
            raise UserError("a schedule needs alpha (the decay) or target_ratio (the budget), one of them")
        start = max(1, round(layers / 4)) if start is None else start
        tail = max(1, min(2, layers - start)) if tail is None else tail
        minimum = min(layers, max(start + tail, math.ceil(layers / 2))) if minimum is None else minimum
        fixed = order if isinstance(order, str) else tuple(order)
        schedule = cls(layers, 1.0 if alpha is None else alpha, start, tail, minimum, fixed, levels)
        return schedule if target_ratio is None else schedule.meeting(target_ratio, expected_tokens)

    def meeting(self, ratio: float, expected_tokens: int | Sequence[float]) -> DepthSchedule:
        """Return this schedule with the decay whose mean depth is nearest to ``ratio`` of all layers.

        Bisection on the schedule as it is, floor and limits included.

        Raises:
            UserError: the ratio is above 1, or below what the minimum allows.
        """
        weights = [1.0] * expected_tokens if isinstance(expected_tokens, int) else list(expected_tokens)
        if sum(weights) <= 0:
            raise UserError("a budget needs at least one expected token")
        lowest = self.minimum / self.layers
        if not lowest <= ratio <= 1:
            raise UserError(
                f"target_ratio = {ratio:g} is not between {lowest:.4g} (the minimum of {self.minimum} of "
                f"{self.layers} layers) and 1"
            )
        none = replace(self, alpha=1.0)
        low, high = replace(self, alpha=lowest), none
        for _ in range(100):
            middle = replace(self, alpha=(low.alpha + high.alpha) / 2)
            if middle.alpha in (low.alpha, high.alpha):
                break
            low, high = (low, middle) if middle.mean_ratio(weights) >= ratio else (middle, high)
        return min((none, high, low), key=lambda one: abs(one.mean_ratio(weights) - ratio))

    @cached_property
    def leaving(self) -> tuple[int, ...]:
        """Layers in the order in which they leave, down to the minimum."""
        flexible = range(self.start, self.layers - self.tail)
        if isinstance(self.order, tuple):
            order: Sequence[int] = self.order
        elif self.order == "spread":
            order = _spread(flexible)
        else:
            order = flexible if self.order == "from_start" else flexible[::-1]
        return tuple(order[: self.layers - self.minimum])

    @cached_property
    def removable(self) -> frozenset[int]:
        """Layers that some step leaves out."""
        return frozenset(self.leaving) if self.alpha < 1 else frozenset()

    @cached_property
    def _by_depth(self) -> dict[int, frozenset[int]]:
        return {
            self.layers - dropped: frozenset(self.leaving[:dropped])
            for dropped in range(len(self.leaving) + 1)
        }

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """The depths that occur, greatest first, if answers are long enough."""
        if self.alpha == 1:
            return (self.layers,)
        return tuple(sorted({self._level(n) for n in range(self.minimum, self.layers + 1)}, reverse=True))

    nested = True

    def depth(self, step: int) -> int:
        """Return n_t, the number of layers of step t."""
        if step <= 0:
            return self.layers
        kept = math.floor(self.layers * self.alpha**step + _GUARD)
        return self._level(max(self.minimum, min(self.layers, kept)))

    def _level(self, depth: int) -> int:
        span = self.layers - self.minimum
        if self.levels is None or span == 0:
            return depth
        gaps = self.levels - 1
        nearest = math.floor((self.layers - depth) * gaps / span + 0.5 - _GUARD)
        return self.layers - math.floor(span * nearest / gaps + 0.5)

    def skipped(self, step: int) -> frozenset[int]:
        """Return the layers that step t leaves out."""
        return self._by_depth[self.depth(step)]

    def mean_ratio(self, expected_tokens: int | Sequence[float]) -> float:
        """Return the mean of n_t / layers over steps 1, 2, ..., each weighed as in :meth:`of`."""
        weights = [1.0] * expected_tokens if isinstance(expected_tokens, int) else expected_tokens
        total = sum(weight * self.depth(step) for step, weight in enumerate(weights, 1))
        return total / (self.layers * sum(weights))

    def as_json(self) -> dict[str, Any]:
        """Return the fields; ``DepthSchedule.from_json`` takes them back."""
        order = list(self.order) if isinstance(self.order, tuple) else self.order
        return {
            "layers": self.layers,
            "alpha": self.alpha,
            "start": self.start,
            "tail": self.tail,
            "minimum": self.minimum,
            "order": order,
            "levels": self.levels,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DepthSchedule:
        """Return the schedule that :meth:`as_json` wrote."""
        order = values["order"]
        return cls(**{**values, "order": tuple(order) if isinstance(order, list) else order})


def _spread(flexible: range) -> list[int]:
    """Return the layers so that the first k are far from each other and from both ends, for every k."""
    left, gone = list(flexible), [flexible.start - 1, flexible.stop]
    order: list[int] = []
    while left:
        layer = max(left, key=lambda one: (min(abs(one - other) for other in gone), -one))
        left.remove(layer)
        gone.append(layer)
        order.append(layer)
    return order
