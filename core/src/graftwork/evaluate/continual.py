"""Metrics of a continual-learning run: pure functions of its score matrix.

The matrix has one row per stage and one column per task: row 0 is the untouched model, row i the
model after i tasks; column j (from 0) is task j + 1. A cell is a score or None where it was not
measured. With a[i][j] the cell of row i and column j (counted as in the literature, from 1) and z the
row 0, for T tasks:

    AP   = 1/T sum_j a[T][j]                        average performance
    LA   = 1/T sum_j a[j][j]                        learning accuracy
    BWT  = 1/(T-1) sum_{j<T} (a[T][j] - a[j][j])    backward transfer (Lopez-Paz and Ranzato, 2017)
    F    = 1/(T-1) sum_{j<T} (max_{j<=k<T} a[k][j] - a[T][j])   forgetting (Chaudhry et al., 2018)
    FWT  = 1/(T-1) sum_{j>1} (a[j-1][j] - z[j])     forward transfer
    stage average = 1/T sum_i 1/i sum_{j<=i} a[i][j]

Every function returns None where a cell that it needs was not measured, or where it is undefined
(transfer needs two tasks). A cell may also be an array, of many resampled scores, say: the metric is
then an array of the same shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Matrix = Sequence[Sequence[Any]]


def average_performance(matrix: Matrix) -> Any:
    return _mean(list(matrix[-1]))


def learning_accuracy(matrix: Matrix) -> Any:
    return _mean([matrix[j + 1][j] for j in range(_tasks(matrix))])


def backward_transfer(matrix: Matrix) -> Any:
    return _mean([_minus(matrix[-1][j], matrix[j + 1][j]) for j in range(_tasks(matrix) - 1)])


def forgetting(matrix: Matrix) -> Any:
    losses = []
    for j in range(_tasks(matrix) - 1):
        seen = [matrix[k][j] for k in range(j + 1, _tasks(matrix))]
        known = [value for value in seen if value is not None]
        best = functools.reduce(np.maximum, known) if len(known) == len(seen) else None
        losses.append(_minus(best, matrix[-1][j]))
    return _mean(losses)


def forward_transfer(matrix: Matrix) -> Any:
    return _mean([_minus(matrix[j][j], matrix[0][j]) for j in range(1, _tasks(matrix))])


def stage_average(matrix: Matrix) -> Any:
    return _mean([_mean([matrix[i][j] for j in range(i)]) for i in range(1, _tasks(matrix) + 1)])


def gain_over_single(matrix: Matrix, single: Sequence[Any]) -> Any:
    """Return the mean of a[j][j] - s[j], s the scores of models trained on one task alone."""
    return _mean([_minus(matrix[j + 1][j], single[j]) for j in range(_tasks(matrix))])


def unseen(before: Sequence[Any], after: Sequence[Any]) -> Any:
    """Return the mean change, after the stream minus before it, over tasks that were never trained."""
    return _mean([_minus(b, a) for a, b in zip(before, after, strict=True)])


METRICS: dict[str, Callable[[Matrix], Any]] = {
    "ap": average_performance,
    "la": learning_accuracy,
    "bwt": backward_transfer,
    "fwt": forward_transfer,
    "forgetting": forgetting,
    "stage_average": stage_average,
}


def metrics(matrix: Matrix) -> dict[str, float | None]:
    """Return all metrics by their short names."""
    values = {name: function(matrix) for name, function in METRICS.items()}
    return {name: None if value is None else float(value) for name, value in values.items()}


def _tasks(matrix: Matrix) -> int:
    return len(matrix) - 1


def _minus(a: Any, b: Any) -> Any:
    return None if a is None or b is None else a - b


def _mean(values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
