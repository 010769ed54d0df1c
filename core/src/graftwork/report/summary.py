"""Group the jobs of a run by arm and reduce them over seeds and orders."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Job = Mapping[str, Any]
Matrix = list[list[float | None]]


@dataclass(frozen=True)
class Column:
    """A column of the comparison: its head with the unit, and how a job's value is read and shown."""

    head: str
    read: Callable[[Job], float | None]
    show: Callable[[float], str]


def _metric(name: str) -> Callable[[Job], float | None]:
    return lambda job: job["metrics"].get(name)


def _last_invalid(job: Job) -> float | None:
    known = [value for value in job["invalid"][-1] if value is not None] if job["invalid"] else []
    return sum(known) / len(known) if known else None


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def count(value: float) -> str:
    for size, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.2f}{suffix}"
    return f"{value:.0f}"


COLUMNS = (
    Column("AP %", _metric("ap"), percent),
    Column("LA %", _metric("la"), percent),
    Column("BWT pt", _metric("bwt"), percent),
    Column("FWT pt", _metric("fwt"), percent),
    Column("forget pt", _metric("forgetting"), percent),
    Column("unseen %", _metric("unseen"), percent),
    Column("invalid %", _last_invalid, percent),
    Column("trained", lambda job: job["trainable_parameters"], count),
    Column("state", lambda job: job["extra_state_bytes"], count),
    Column("train s", lambda job: job["train_seconds"], lambda value: f"{value:.0f}"),
    Column("peak MiB", lambda job: job["peak_memory_bytes"] / 2**20, lambda value: f"{value:.0f}"),
)


def by_arm(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """Return the jobs of every arm, arms in the order they first appear."""
    arms: dict[str, list[Job]] = {}
    for job in jobs:
        arms.setdefault(job["name"], []).append(job)
    return arms


def finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation (0 for a single value)."""
    if len(values) < 2:
        return 0.0
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))


def comparison(jobs: Sequence[Job]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the comparison of arms, without columns that would be empty or all zero."""
    arms = by_arm(jobs)
    columns = [c for c in COLUMNS if _worth_showing(c, jobs)]
    several = any(len(members) > 1 for members in arms.values())
    heads = ["method", *(["runs"] if several else []), *(column.head for column in columns)]
    rows = []
    for arm, members in arms.items():
        cells = [arm, *([str(len(members))] if several else [])]
        for column in columns:
            values = finite([column.read(job) for job in members])
            text = column.show(mean(values)) if values else ""
            if len(values) > 1 and column.head.endswith(("%", "pt")):
                text += f" ± {column.show(deviation(values))}"
            cells.append(text)
        rows.append(cells)
    return heads, rows


def _worth_showing(column: Column, jobs: Sequence[Job]) -> bool:
    """Drop a column without any value, and the state of methods that keep none."""
    values = [value for job in jobs for value in finite([column.read(job)])]
    return any(values) if column.head == "state" else bool(values)


def mean_matrix(jobs: Sequence[Job]) -> tuple[list[str], Matrix]:
    """Return task names and the mean score matrix of jobs that share one task order."""
    order = list(jobs[0]["order"])
    same = [job for job in jobs if list(job["order"]) == order and job["scores"]]
    rows, columns = len(order) + 1, len(order)
    result: Matrix = []
    for i in range(rows):
        cells = [finite([job["scores"][i][j] for job in same]) for j in range(columns)]
        result.append([mean(values) if values else None for values in cells])
    return order, result


def orders(jobs: Sequence[Job]) -> list[list[Job]]:
    """Group scored jobs by task order, in the order they first appear."""
    groups: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        if job["scores"]:
            groups.setdefault(tuple(job["order"]), []).append(job)
    return list(groups.values())
