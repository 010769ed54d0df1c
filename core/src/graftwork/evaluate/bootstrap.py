"""Paired bootstrap of the difference between two methods, over runs and test items.

A run of method A and a run of method B form a pair when they share seed and task order, hence test
items. Each draw takes pairs with replacement, and items with replacement inside every pair and task, so
both the luck of a seed and the luck of a test set are in the interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graftwork.errors import UserError

Items = Sequence[Sequence[Sequence[int] | None]]


@dataclass(frozen=True)
class Interval:
    """A difference A - B (in score units, 0 to 1) and its percentile interval."""

    difference: float
    low: float
    high: float


def paired_bootstrap(
    pairs: Sequence[tuple[Items, Items]],
    metric: str,
    *,
    draws: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return the interval of ``metric`` (``ap``, ``bwt`` or ``la``) of A minus that of B.

    ``pairs`` holds the per-item correctness matrices (rows 0 to T, columns tasks, cells lists of 0/1).

    Raises:
        UserError: a cell that the metric needs is missing, or the two runs scored different items.
    """
    generator = np.random.default_rng(seed)
    means = np.empty((draws, len(pairs)))
    observed = np.empty(len(pairs))
    for index, (a, b) in enumerate(pairs):
        differences = [x - y for x, y in zip(_parts(a, metric), _parts(b, metric), strict=True)]
        observed[index] = np.mean([part.mean() for part in differences])
        resampled = [
            part[generator.integers(len(part), size=(draws, len(part)))].mean(1) for part in differences
        ]
        means[:, index] = np.mean(resampled, axis=0)
    chosen = generator.integers(len(pairs), size=(draws, len(pairs)))
    samples = np.take_along_axis(means, chosen, axis=1).mean(1)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(samples, [tail, 100 - tail])
    return Interval(float(observed.mean()), float(low), float(high))


def _parts(items: Items, metric: str) -> list[np.ndarray[Any, Any]]:
    """Return per task the vector whose mean is that task's share of the metric."""
    tasks = len(items) - 1
    if metric == "ap":
        return [_cell(items, tasks, j) for j in range(tasks)]
    if metric == "la":
        return [_cell(items, j + 1, j) for j in range(tasks)]
    if metric == "bwt" and tasks > 1:
        return [_cell(items, tasks, j) - _cell(items, j + 1, j) for j in range(tasks - 1)]
    raise UserError(
        f"the metric '{metric}' cannot be bootstrapped over {tasks} tasks; use ap, la, or bwt from two tasks on"
    )


def _cell(items: Items, row: int, column: int) -> np.ndarray[Any, Any]:
    cell = items[row][column]
    if not cell:
        raise UserError(
            f"task {column + 1} was not scored after task {row}; run with evaluate.cells: all or seen"
        )
    return np.asarray(cell, dtype=float)
