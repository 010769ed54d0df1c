"""Figures as inline SVG: score matrices, forgetting curves, losses, comparisons.

Every function takes the jobs to draw. ``numbers`` gives every arm its colour and marker, so that an arm
looks the same in all figures of a page; without it, arms are numbered as they appear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

from graftwork.report.canvas import (
    FAINT,
    INK,
    PAPER,
    WIDTH,
    grid,
    legend,
    name,
    readable_on,
    series,
    styled,
    svg,
)
from graftwork.report.summary import (
    Job,
    Matrix,
    by_arm,
    cell,
    deviation,
    finite,
    mean,
    mean_matrix,
    shares,
    untouched,
)

LINES = 8
"""Arms per figure that can still be told apart."""


def heat_maps(jobs: Sequence[Job]) -> str:
    """Return one accuracy matrix per arm, mean over its runs, all on one colour scale.

    Rows say after which task, columns which task is asked. The jobs share one order of tasks.
    """
    chosen = by_arm(jobs)
    order = [name(task, 18) for task in jobs[0]["order"]]
    tasks, longest = len(order), max(map(len, order))
    margin = 0.5 + 0.07 * (6 + longest)
    room = WIDTH - margin - 0.7
    # Cells shrink a little where that lets all arms stand side by side; else rows are of even length.
    if tasks <= 6:
        wide, least, tall, letters = 0.56, 0.42, 0.3, 9.5
    elif tasks <= 10:
        wide, least, tall, letters = 0.46, 0.34, 0.26, 8.5
    else:
        wide, least, tall, letters = 0.265, 0.265, 0.24, 7.5
    across = max(1, min(len(chosen), int(room / (tasks * least + 0.2))))
    down = -(-len(chosen) // across)
    across = -(-len(chosen) // down)
    panel = min(max(1.4, tasks * wide + 0.25), room / across)
    with styled():
        figure, axes = grid(
            len(chosen),
            across,
            margin + 0.7 + across * panel,
            down * ((tasks + 1) * tall + 0.4) + 0.25 + 0.05 * longest,
            sharex=True,
            sharey=True,
        )
        colours = mpl.colormaps["cividis"].resampled(20)
        mesh: Any = None
        for axis, (arm, members) in zip(axes, chosen.items(), strict=True):
            mesh = _heat_map(axis, mean_matrix(members), colours, letters)
            axis.set_title(name(arm))
        tilt: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        for number, axis in enumerate(axes):
            axis.set_xticks(range(tasks), order, **(tilt if longest * 0.085 > panel / tasks else {}))
            # The last row may be shorter: the panel above its gap has nobody below to carry the names.
            axis.tick_params(labelbottom=number + across >= len(axes))
        axes[0].set_yticks(range(tasks + 1), ["untouched", *(f"after {task}" for task in order)])
        axes[0].invert_yaxis()
        bar = figure.colorbar(
            mesh, ax=axes, aspect=20, fraction=0.025, pad=0.015, shrink=1 / down, anchor=(0.0, 1.0)
        )
        bar.set_label("accuracy, %")
        bar.outline.set_visible(False)  # type: ignore[operator]
        return svg(figure)


def _heat_map(axis: Axes, matrix: Matrix, colours: Any, letters: float) -> Any:
    values = [[math.nan if value is None else 100 * value for value in row] for row in matrix]
    # Cells are centred on whole numbers, as ticks are.
    x, y = ([k - 0.5 for k in range(size + 1)] for size in (len(values[0]), len(values)))
    mesh: Any = axis.pcolormesh(x, y, values, cmap=colours, vmin=0, vmax=100, edgecolor=PAPER, linewidth=0.8)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if math.isfinite(value):
                axis.text(
                    j,
                    i,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    color=readable_on(mesh.to_rgba(value)),
                    fontsize=letters,
                    # The diagonal is what was just learned.
                    fontweight="bold" if i == j + 1 else "normal",
                )
    tasks = len(matrix) - 1
    if tasks > 1:
        # Left of the steps: tasks learned so far. Right of them: tasks to come.
        steps = [(k // 2 - 0.5, (k + 1) // 2 + 0.5) for k in range(2 * tasks)]
        axis.plot(*zip(*steps, strict=True), color=PAPER, lw=3.2, solid_capstyle="butt")
    axis.set_xlim(-0.5, tasks - 0.5)
    axis.set_ylim(-0.5, tasks + 0.5)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    return mesh


def forgetting_curves(jobs: Sequence[Job], numbers: Mapping[str, int] | None = None) -> str:
    """Return one panel per task: its accuracy after every stage, a line per arm, spread over runs shaded.

    The jobs share one order of tasks.
    """
    order = list(jobs[0]["order"])
    across = min(len(order), 4 if len(order) != 5 else 5)
    down = -(-len(order) // across)
    chosen = by_arm(jobs)
    numbers = numbers or arm_numbers(jobs)
    with styled():
        figure, axes = grid(
            len(order), across, min(WIDTH, 1 + 3.2 * across), 2.15 * down + 0.9, sharex=True, sharey=True
        )
        handles = []
        for task, axis in enumerate(axes):
            axis.axvline(task + 1, color=FAINT, lw=1, ls=(0, (2, 2)))
            handles = [
                _curve(
                    axis, [[cell(job, stage, task) for job in members] for stage in range(len(order) + 1)], n
                )
                for n, members in ((numbers[arm], members) for arm, members in chosen.items())
            ]
            axis.set_title(f"{task + 1}  {name(order[task])}")
            axis.set_ylim(-4, 104)
            axis.set_xlim(-0.3, len(order) + 0.3)
            axis.set_xticks(range(0, len(order) + 1, 1 if len(order) <= 8 else 3))
            axis.grid(axis="x", visible=False)
            axis.tick_params(labelbottom=task + across >= len(order))
        figure.supxlabel("tasks learned so far", fontsize=9.5, color=FAINT)
        figure.supylabel("accuracy, %", fontsize=9.5, color=FAINT)
        legend(figure, handles, [name(arm) for arm in chosen])
        return svg(figure)


def _curve(axis: Axes, runs: Sequence[Sequence[float | None]], number: int) -> Any:
    """Draw mean and standard deviation of ``runs`` (one list per stage)."""
    known = {stage: shares(values) for stage, values in enumerate(runs)}
    stages = [stage for stage, values in known.items() if values]
    centres = [100 * mean(known[stage]) for stage in stages]
    spreads = [100 * deviation(known[stage]) for stage in stages]
    look = series(number)
    if any(spreads):
        low = [centre - spread for centre, spread in zip(centres, spreads, strict=True)]
        high = [centre + spread for centre, spread in zip(centres, spreads, strict=True)]
        axis.fill_between(stages, low, high, color=look.colour, alpha=0.16, lw=0)
    return axis.plot(stages, centres, color=look.colour, marker=look.marker, ls=look.dashes, ms=4.2, lw=1.7)[
        0
    ]


def bars(jobs: Sequence[Job], numbers: Mapping[str, int] | None = None) -> str:
    """Return average performance and backward transfer per arm: mean, standard deviation, a dot per run."""
    arms = by_arm(jobs)
    panels = [
        (metric, title)
        for metric, title in (
            ("ap", "Average accuracy at the end, %"),
            ("bwt", "Change since a task was learned, points"),
        )
        if shares([(job.get("metrics") or {}).get(metric) for job in jobs])
    ]
    if not panels:
        return ""
    numbers = numbers or arm_numbers(jobs)
    base = untouched(jobs)
    with styled():
        figure, axes = grid(len(panels), len(panels), WIDTH, 0.36 * len(arms) + 0.85, sharey=True)
        for axis, (metric, title) in zip(axes, panels, strict=True):
            for row, (arm, members) in enumerate(arms.items()):
                values = shares([(job.get("metrics") or {}).get(metric) for job in members])
                _bar(axis, row, values, numbers[arm])
            axis.axvline(0, color=FAINT, lw=0.9)
            if metric == "ap" and base is not None:
                axis.axvline(100 * base, color=INK, lw=1, ls=(0, (3, 2)))
                axis.annotate(
                    f"untouched {100 * base:.1f}",
                    (100 * base, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(3, 0),
                    textcoords="offset points",
                    fontsize=8,
                    color=FAINT,
                    va="bottom",
                )
            axis.set_title(title + ("\n" if base is not None else ""))
            axis.grid(axis="y", visible=False)
            axis.margins(x=0.12)
            _keep_small_small(axis, None)
        axes[0].set_yticks(range(len(arms)), [name(arm) for arm in arms])
        axes[0].set_ylim(len(arms) - 0.45, -0.55)
        return svg(figure)


def _bar(axis: Axes, row: int, values: Sequence[float], number: int) -> None:
    values = [100 * value for value in values]
    if not values:
        return
    centre = mean(values)
    axis.barh(row, centre, color=series(number).colour, height=0.6, alpha=0.85)
    if len(values) > 1:
        axis.errorbar(centre, row, xerr=deviation(values), color=INK, lw=1.2, capsize=3)
        axis.plot(values, [row + 0.18] * len(values), "o", color=INK, ms=2.6, alpha=0.75, lw=0)


def loss_curves(jobs: Sequence[Job], numbers: Mapping[str, int] | None = None) -> str:
    """Return the training loss and every named loss term over the steps of all tasks, a line per arm.

    A line is the mean over the runs of the arm. The jobs share one order of tasks. Points that are not
    finite are marked on the axis, not dropped in silence.
    """
    chosen = by_arm(jobs)
    numbers = numbers or arm_numbers(jobs)
    segments = {arm: [_segments(job) for job in members] for arm, members in chosen.items()}
    starts = _starts([runs for members in segments.values() for runs in members])
    terms = list(
        dict.fromkeys(k for job in jobs for point in job.get("losses") or [] for k in point if _is_loss(k))
    )
    if not terms:
        return ""
    tasks = list(jobs[0].get("order") or [])
    with styled():
        figure, axes = grid(len(terms), 1, WIDTH, 1.95 * len(terms) + 0.9, sharex=True)
        handles = []
        for axis, term in zip(axes, terms, strict=True):
            lines = [_loss_line(axis, runs, starts, term, numbers[arm]) for arm, runs in segments.items()]
            handles = handles or lines
            axis.set_title(
                "training loss" if term == "loss" else f"loss term: {name(term.partition('/')[2] or term)}"
            )
            for start in starts[1:-1]:
                axis.axvline(start, color=FAINT, lw=0.8, ls=(0, (2, 2)))
        for number, (start, task) in enumerate(zip(starts[:-1], tasks, strict=False), 1):
            axes[0].annotate(
                f"{number}  {name(task, 16)}" if len(starts) <= 7 else str(number),
                (start, 1),
                xycoords=("data", "axes fraction"),
                xytext=(4, -2),
                textcoords="offset points",
                fontsize=8,
                color=FAINT,
                va="top",
            )
        axes[-1].set_xlabel("optimizer steps, task after task")
        axes[-1].set_xlim(0, max(1, starts[-1]))
        if len(by_arm(jobs)) > 1:
            legend(figure, handles, [name(arm) for arm in segments])
        return svg(figure)


_Point = tuple[float, float, float, float]
"""Step, mean over runs, lowest, highest."""


def _is_loss(key: str) -> bool:
    return key == "loss" or key.startswith("loss/")


def _segments(job: Job) -> list[list[Mapping[str, Any]]]:
    """Return the logged points task by task."""
    found: list[list[Mapping[str, Any]]] = []
    for point in job.get("losses") or []:
        if not found or found[-1][-1].get("task") != point.get("task"):
            found.append([])
        found[-1].append(point)
    return found


def _starts(runs: Sequence[Sequence[Sequence[Mapping[str, Any]]]]) -> list[int]:
    """Return the first step of every task on the common axis, and the end; steps count within a task."""
    starts = [0]
    for number in range(max(map(len, runs), default=0)):
        starts.append(starts[-1] + max(run[number][-1]["step"] for run in runs if number < len(run)))
    return starts


def _loss_line(
    axis: Axes,
    runs: Sequence[Sequence[Sequence[Mapping[str, Any]]]],
    starts: Sequence[int],
    term: str,
    number: int,
) -> Any:
    """Draw the mean of ``runs``, and a band from the lowest to the highest of them."""
    look = series(number)
    rows: list[_Point] = []
    broken: list[float] = []
    for index, start in enumerate(starts[:-1]):
        found: dict[int, list[float]] = {}
        for run in runs:
            for point in run[index] if index < len(run) else ():
                if point.get(term) is not None:
                    found.setdefault(start + point["step"], []).append(_drawable(point[term]))
        points = [(step, mean(losses), min(losses), max(losses)) for step, losses in sorted(found.items())]
        points = _thin(points, max(24, 960 // len(starts)))
        rows += points
        broken += [point[0] for point in points if not math.isfinite(point[1])]
        rows.append((starts[index + 1], math.nan, math.nan, math.nan))  # the gap says that a task begins
    steps, centres, lows, highs = (list(column) for column in zip(*rows, strict=True))
    if broken:
        place = {"transform": axis.get_xaxis_transform(), "clip_on": False}
        axis.plot(broken, [0.02] * len(broken), "x", color=look.colour, ms=6, mew=1.6, **place)
    if len(runs) > 1:
        axis.fill_between(steps, lows, highs, color=look.colour, alpha=0.14, lw=0)
    alone = 0 < len(finite(centres)) <= 2 * len(starts)
    marker = "." if alone else None
    return axis.plot(steps, centres, color=look.colour, ls=look.dashes, lw=1.4, marker=marker)[0]


def _drawable(value: float) -> float:
    # Axes overflow on numbers near the limit of floats; a loss of that size is as broken as NaN.
    return float(value) if abs(value) < 1e30 else math.nan


def _thin(points: Sequence[_Point], limit: int) -> list[_Point]:
    """Return fewer points that show the same line: the lowest and highest of every stretch."""
    if len(points) <= limit:
        return list(points)
    size = -(-2 * len(points) // limit)
    kept: list[_Point] = []
    for first in range(0, len(points), size):
        stretch = points[first : first + size]
        # What is not a number must stay visible, and has no order.
        odd = [point for point in stretch if not math.isfinite(point[1])]
        kept += sorted({min(stretch, key=_centre), max(stretch, key=_centre)}) if not odd else odd[:1]
    return kept


def _centre(point: _Point) -> float:
    return point[1]


def general_ability(jobs: Sequence[Job], numbers: Mapping[str, int] | None = None) -> str:
    """Return general ability before (hollow) and after (filled) training.

    There is a panel per measure, and a row per arm.
    """
    arms = {arm: members for arm, members in by_arm(jobs).items() if any(_ability(m) for m in members)}
    measures = list(
        dict.fromkeys(key for members in arms.values() for job in members for key in _ability(job))
    )
    if not measures:
        return ""
    numbers = numbers or arm_numbers(jobs)
    across = min(len(measures), 3)
    down = -(-len(measures) // across)
    with styled():
        figure, axes = grid(len(measures), across, WIDTH, down * (0.3 * len(arms) + 0.75) + 0.2, sharey=True)
        for axis, measure in zip(axes, measures, strict=True):
            scale = 1.0 if measure == "perplexity" else 100.0
            for row, (arm, members) in enumerate(arms.items()):
                pairs = [_ability(job).get(measure, (None, None)) for job in members]
                before, after = (_center([pair[side] for pair in pairs], scale) for side in (0, 1))
                _dumbbell(axis, row, before, after, series(numbers[arm]).colour)
            axis.set_title(
                "perplexity (lower is better)" if measure == "perplexity" else f"{name(measure)}, %"
            )
            axis.grid(axis="y", visible=False)
            axis.margins(x=0.12)
            _keep_small_small(axis, 0.2 if measure == "perplexity" else None)
        axes[0].set_yticks(range(len(arms)), [name(arm) for arm in arms])
        axes[0].set_ylim(len(arms) - 0.4, -0.6)
        return svg(figure)


def _keep_small_small(axis: Axes, share: float | None) -> None:
    """Widen the axis to 10 points, or to ``share`` of its values: a change of one must look like one."""
    low, high = axis.get_xlim()
    least = 10.0 if share is None else share * abs(high)
    if high - low < least:
        middle = (low + high) / 2
        axis.set_xlim(middle - least / 2, middle + least / 2)


def _ability(job: Job) -> dict[str, tuple[float | None, float | None]]:
    general = job.get("general") or {}
    before, after = general.get("before") or {}, general.get("after") or {}
    return {key: (before.get(key), after.get(key)) for key in dict.fromkeys([*before, *after])}


def _center(values: Sequence[float | None], scale: float) -> float | None:
    known = shares(values) if scale > 1 else finite(map(_drawable, finite(values)))
    return scale * mean(known) if known else None


def _dumbbell(axis: Axes, row: int, before: float | None, after: float | None, colour: str) -> None:
    if before is not None and after is not None:
        axis.plot([before, after], [row, row], color=colour, lw=2, alpha=0.55)
    if after is not None:
        axis.plot(after, row, "o", color=colour, ms=7.5)
    if before is not None:
        axis.plot(before, row, "o", mfc=PAPER, mec=colour, mew=1.6, ms=6)


def arm_numbers(jobs: Sequence[Job]) -> dict[str, int]:
    """Number the arms in the order they first appear."""
    return {arm: number for number, arm in enumerate(by_arm(jobs))}
