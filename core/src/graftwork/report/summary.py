"""Group the jobs of a run by arm and reduce them over seeds and orders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.report.words import clean, count, mebibytes, percent, points, seconds

Job = Mapping[str, Any]
Matrix = list[list[float | None]]
Cells = tuple[list[str], list[list[str]]]
"""Heads and rows of a table."""


@dataclass(frozen=True)
class Column:
    """A column of the comparison: its head with the unit, and how a job's value is read and shown."""

    head: str
    read: Callable[[Job], float | None]
    show: Callable[[float], str]
    spread: bool = True
    """Whether the standard deviation over runs belongs to it."""
    least: float = -math.inf
    """Left out where no run has more than this."""
    cost: bool = False
    """Whether it tells what a method takes, not how well it does."""


def _metric(name: str) -> Callable[[Job], float | None]:
    return lambda job: (job.get("metrics") or {}).get(name)


def _cost(name: str) -> Callable[[Job], float | None]:
    # 0 is what a job writes that did not measure, or that has no such thing.
    return lambda job: job.get(name) or None


def _last_invalid(job: Job) -> float | None:
    """Return the mean share of invalid answers after the last stage."""
    known = [value for value in (job.get("invalid") or [[]])[-1] if value is not None]
    return mean(known) if known else None


COLUMNS = (
    Column("AP %", _metric("ap"), percent),
    Column("LA %", _metric("la"), percent),
    Column("BWT points", _metric("bwt"), points),
    Column("FWT points", _metric("fwt"), points),
    Column("forgetting points", _metric("forgetting"), points),
    Column("unseen %", _metric("unseen"), percent),
    Column("invalid %", _last_invalid, percent),
    Column("trained", _cost("trainable_parameters"), count, spread=False, cost=True),
    Column("adapter MiB", _cost("adapter_bytes"), mebibytes, spread=False, cost=True),
    Column("state MiB", _cost("extra_state_bytes"), mebibytes, spread=False, cost=True),
    Column("train s", _cost("train_seconds"), seconds, spread=False, cost=True),
    Column("statistics s", _cost("statistics_seconds"), seconds, spread=False, cost=True, least=0.05),
    Column("peak MiB", _cost("peak_memory_bytes"), mebibytes, spread=False, cost=True),
)


def by_arm(jobs: Iterable[Job]) -> dict[str, list[Job]]:
    """Return the jobs of every arm, arms in the order they first appear."""
    arms: dict[str, list[Job]] = {}
    for job in jobs:
        arms.setdefault(str(job["name"]), []).append(job)
    return arms


def by_order(jobs: Iterable[Job]) -> list[list[Job]]:
    """Group jobs by the order of their tasks, in the order they first appear."""
    groups: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(tuple(map(str, job.get("order") or ())), []).append(job)
    return list(groups.values())


def scored(jobs: Iterable[Job]) -> list[Job]:
    """Return the jobs that measured anything on a task."""
    return [job for job in jobs if any(value is not None for row in job.get("scores") or [] for value in row)]


def label(job: Job) -> str:
    """Return what tells this job from the others: its arm, its variant, its seed."""
    variant = str(job.get("variant") or "")
    seed = "" if "seed" in variant or job.get("seed") is None else f"seed={job['seed']}"
    return clean(" ".join(filter(None, [str(job["name"]), variant, seed])))


def cell(job: Job, stage: int, task: int) -> float | None:
    """Return the score of a task after a stage; None where it is missing (also in a stream cut short)."""
    rows = job.get("scores") or []
    return rows[stage][task] if stage < len(rows) and task < len(rows[stage]) else None


def finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def shares(values: Iterable[float | None]) -> list[float]:
    """Return the values that a figure in percent can show; the tables show the others."""
    return [value for value in finite(values) if abs(value) <= 10]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation (0 for a single value)."""
    if len(values) < 2:
        return 0.0
    centre = mean(values)
    return math.sqrt(sum((value - centre) * (value - centre) for value in values) / (len(values) - 1))


def mean_matrix(jobs: Sequence[Job]) -> Matrix:
    """Return the mean score matrix, for figures, of jobs that share one order of tasks."""
    columns = len(jobs[0]["order"])
    cells = [[shares([cell(job, i, j) for job in jobs]) for j in range(columns)] for i in range(columns + 1)]
    return [[mean(values) if values else None for values in row] for row in cells]


def untouched(jobs: Iterable[Job]) -> float | None:
    """Return the mean accuracy of the untouched model on the tasks, where every job measured all."""
    rows = [job["scores"][0] for job in scored(jobs)]
    values = [value for row in rows for value in row]
    return mean(finite(values)) if values and len(finite(values)) == len(values) else None


def comparison(jobs: Sequence[Job], cost: bool | None = None) -> Cells:
    """Return heads and rows that compare the arms, without columns that would be empty.

    ``cost`` keeps only the columns that tell what a method takes, or only those that do not.

    A cell is the mean over the runs of an arm, ``±`` their standard deviation; ``(n=2)`` where fewer runs
    than the arm has gave a value, ``nan`` where one of them is no number.
    """
    arms = by_arm(jobs)
    columns = [column for column in COLUMNS if any(_tells(column, job) for job in jobs)]
    columns = [column for column in columns if cost is None or column.cost == cost]
    several = not cost and any(len(members) > 1 for members in arms.values())
    heads = ["method", *(["runs"] if several else []), *(column.head for column in columns)]
    rows = [
        [clean(arm), *([str(len(members))] if several else []), *(_over_runs(c, members) for c in columns)]
        for arm, members in arms.items()
    ]
    return heads, rows


def _tells(column: Column, job: Job) -> bool:
    value = column.read(job)
    return value is not None and not value <= column.least  # what is no number is shown, too


def _over_runs(column: Column, members: Sequence[Job]) -> str:
    known = [value for value in map(column.read, members) if value is not None]
    if not known:
        return ""
    if len(finite(known)) < len(known):
        return "nan"
    text = column.show(mean(known))
    if column.spread and len(known) > 1:
        text += f" ± {percent(deviation(known))}"
    return text + (f" (n={len(known)})" if len(known) < len(members) else "")


def score_cells(job: Job, *, numbered: bool = False) -> Cells:
    """Return the accuracy of every task after every task; the last column averages the tasks learned.

    ``numbered`` writes the columns as numbers, which the rows explain.
    """
    order = [clean(name) for name in job.get("order") or []]
    rows = []
    for stage in range(len(order) + 1):
        row = [cell(job, stage, task) for task in range(len(order))]
        if all(value is None for value in row):
            continue
        learned = finite(row[:stage])
        average = percent(mean(learned)) if stage and len(learned) == stage else ""
        name = "untouched model" if not stage else f"{stage if numbered else 'after'} {order[stage - 1]}"
        rows.append([name, *("" if value is None else percent(value) for value in row), average])
    if numbered:
        return ["after, accuracy %", *(str(n + 1) for n in range(len(order))), "mean"], rows
    return ["accuracy %", *order, "mean of learned"], rows


def general_cells(job: Job) -> Cells:
    """Return general ability before, after and the change: perplexity, and accuracy on other tasks."""
    general = job.get("general") or {}
    before, after = general.get("before") or {}, general.get("after") or {}
    rows = []
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        change = None if old is None or new is None else new - old
        if name == "perplexity":
            head, show, show_change = "perplexity", "{:.2f}".format, "{:+.2f}".format
        else:
            head, show, show_change = f"{clean(name)} %", percent, points
        rows.append(
            [
                head,
                "" if old is None else show(old),
                "" if new is None else show(new),
                "" if change is None else show_change(change),
            ]
        )
    return ["general ability", "before", "after", "change"], rows


def expect_cells(result: Mapping[str, Any]) -> Cells:
    """Return the claims with their verdicts."""
    rows = [
        [clean(claim.get(key, "")) for key in ("text", "verdict", "detail")]
        for claim in result.get("expect") or []
    ]
    return ["claim", "verdict", "detail"], rows
