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
(transfer needs two tasks).
"""

from __future__ import annotations

from collections.abc import Sequence

Matrix = Sequence[Sequence[float | None]]


def metrics(matrix: Matrix) -> dict[str, float | None]:
    """Return all metrics by their short names."""
    return {
        "ap": average_performance(matrix),
        "la": learning_accuracy(matrix),
        "bwt": backward_transfer(matrix),
        "fwt": forward_transfer(matrix),
        "forgetting": forgetting(matrix),
        "stage_average": stage_average(matrix),
    }


def average_performance(matrix: Matrix) -> float | None:
    return _mean(list(matrix[-1]))


def learning_accuracy(matrix: Matrix) -> float | None:
    return _mean([matrix[j + 1][j] for j in range(_tasks(matrix))])


def backward_transfer(matrix: Matrix) -> float | None:
    return _mean([_minus(matrix[-1][j], matrix[j + 1][j]) for j in range(_tasks(matrix) - 1)])


def forgetting(matrix: Matrix) -> float | None:
    losses: list[float | None] = []
    for j in range(_tasks(matrix) - 1):
        seen = [matrix[k][j] for k in range(j + 1, _tasks(matrix))]
        known = [value for value in seen if value is not None]
        losses.append(_minus(max(known), matrix[-1][j]) if len(known) == len(seen) else None)
    return _mean(losses)


def forward_transfer(matrix: Matrix) -> float | None:
    return _mean([_minus(matrix[j][j], matrix[0][j]) for j in range(1, _tasks(matrix))])


def stage_average(matrix: Matrix) -> float | None:
    return _mean([_mean([matrix[i][j] for j in range(i)]) for i in range(1, _tasks(matrix) + 1)])


def gain_over_single(matrix: Matrix, single: Sequence[float | None]) -> float | None:
    """Return the mean of a[j][j] - s[j], s the scores of models trained on one task alone."""
    return _mean([_minus(matrix[j + 1][j], single[j]) for j in range(_tasks(matrix))])


def _tasks(matrix: Matrix) -> int:
    return len(matrix) - 1


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
