"""Paired bootstrap of the difference between two methods, over runs and test items.

A run of method A and a run of method B form a pair when they share seed and task order, hence test
items. Each draw takes pairs with replacement, and the items of every task with replacement, so both the
luck of a seed and the luck of a test set are in the interval. The same draw of a task's items serves
both methods, all stages and all pairs: runs with other seeds that were scored on the same items do not
make the test set any larger.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from graftwork.errors import UserError, did_you_mean
from graftwork.evaluate.continual import METRICS, Matrix

Items = Sequence[Sequence[Sequence[int] | None]]
Relation = Literal["<", "<=", ">", ">="]
Verdict = Literal["held", "not decided", "refuted"]


@dataclass(frozen=True)
class Interval:
    """A difference A - B (in score units, 0 to 1) and its percentile interval."""

    difference: float
    low: float
    high: float

    def verdict(self, relation: Relation, margin: float = 0.0) -> Verdict:
        """Say whether ``difference relation margin`` holds for the whole interval, none of it, or a part."""
        low, high = self.low - margin, self.high - margin
        if relation.startswith("<"):
            low, high = -high, -low
        return "held" if low > 0 else "refuted" if high < 0 else "not decided"


def paired_bootstrap(
    pairs: Sequence[tuple[Items, Items]],
    metric: str | Callable[[Matrix], Any],
    *,
    orders: Sequence[Sequence[str]] | None = None,
    draws: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the interval of ``metric`` of A minus that of B.

    ``pairs`` holds the per-item correctness matrices (rows 0 to T, columns tasks, cells lists of 0/1 or
    None). ``metric`` is a name in :data:`graftwork.evaluate.continual.METRICS`, or any function of a
    score matrix that works on arrays as well. ``orders`` gives the tasks of every pair by name; needed
    where pairs differ in their order, to know the same task in another column.

    Raises:
        UserError: an unknown metric, a cell missing that it needs, or two runs scored on different items.
    """
    if isinstance(metric, str) and metric not in METRICS:
        raise UserError(
            f"no metric '{metric}'{did_you_mean(metric, METRICS)}; a score matrix gives: {', '.join(METRICS)}"
        )
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")
    function = METRICS[metric] if isinstance(metric, str) else metric
    if not pairs:
        raise UserError(f"no two runs to compare by '{name}'; both methods need a run of the same variant")
    generator = np.random.default_rng(seed)
    weights: dict[tuple[Any, int], np.ndarray[Any, Any]] = {}
    observed, samples = np.empty(len(pairs)), np.empty((draws, len(pairs)))
    for index, (a, b) in enumerate(pairs):
        columns = orders[index] if orders else range(len(a[0]))
        _check_pair(a, b)
        for column, task in enumerate(columns):
            size = _size(a, b, column)
            if size and (task, size) not in weights:
                # How often each item is drawn; row 0 is the test set as it is.
                drawn = generator.multinomial(size, np.full(size, 1 / size), size=draws)
                weights[task, size] = np.vstack([np.ones(size), drawn]) / size
        sides = []
        for side in (a, b):
            cells = [
                [
                    None if not cell else weights[task, len(cell)] @ np.asarray(cell, dtype=float)
                    for task, cell in zip(columns, row, strict=True)
                ]
                for row in side
            ]
            value = function(cells)
            if value is None:
                raise UserError(
                    f"'{name}' needs cells that were not scored, or more tasks; run with evaluate.cells: all"
                )
            sides.append(value)
        difference = sides[0] - sides[1]
        observed[index], samples[:, index] = difference[0], difference[1:]
    chosen = generator.integers(len(pairs), size=(draws, len(pairs)))
    means = np.take_along_axis(samples, chosen, axis=1).mean(1)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(observed.mean()), float(low), float(high))


def item_bootstrap(
    pairs: Sequence[tuple[Sequence[float | None], Sequence[float | None] | None]],
    *,
    factor: float = 1.0,
    draws: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Interval, int] | None:
    """Return the interval of mean(A) minus ``factor`` times mean(B), and how many items it rests on.

    Every pair holds two runs on the same items; B is None for A alone. An item that is None on either side
    does not count. One draw of the items serves all runs, as they answer the same ones; runs are drawn with
    replacement, too. None where no item counts.
    """
    generator = np.random.default_rng(seed)
    observed, samples, counts = [], [], []
    drawn: dict[int, np.ndarray[Any, Any]] = {}
    for a, b in pairs:
        other = [0.0] * len(a) if b is None else b
        values = np.array(
            [np.nan if x is None or y is None else x - factor * y for x, y in zip(a, other, strict=True)],
            dtype=float,
        )
        counting = ~np.isnan(values)
        if not counting.any():
            return None
        if len(values) not in drawn:
            size = len(values)
            drawn[size] = generator.multinomial(size, np.full(size, 1 / size), size=draws)
        weights = drawn[len(values)] * counting
        total = weights.sum(1)
        filled = np.where(counting, values, 0.0)
        # A draw without a counting item says nothing; the observed mean stands in.
        mean = filled.sum() / counting.sum()
        samples.append(np.where(total > 0, weights @ filled / np.maximum(total, 1), mean))
        observed.append(mean)
        counts.append(int(counting.sum()))
    chosen = generator.integers(len(pairs), size=(draws, len(pairs)))
    means = np.take_along_axis(np.stack(samples, axis=1), chosen, axis=1).mean(1)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(np.mean(observed)), float(low), float(high)), min(counts)


def _check_pair(a: Items, b: Items) -> None:
    if len(a) != len(b) or len(a[0]) != len(b[0]):
        raise UserError(
            f"two runs to compare have {len(a[0])} and {len(b[0])} tasks; compare runs of the same stream"
        )


def _size(a: Items, b: Items, column: int) -> int:
    """Return the number of items that all cells of a task were scored on, 0 where none was."""
    sizes = {len(cell) for side in (a, b) for row in side if (cell := row[column])}
    if len(sizes) > 1:
        shown = " and ".join(map(str, sorted(sizes)))
        raise UserError(
            f"task {column + 1} was scored on {shown} items; a paired comparison needs the same items"
        )
    return sizes.pop() if sizes else 0
