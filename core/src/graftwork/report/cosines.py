"""How the updates of the tasks point: the cosine of every two, a panel per arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl

from graftwork.report.canvas import PAPER, WIDTH, grid, name, readable_on, styled, svg
from graftwork.report.summary import Job, Matrix, by_arm, by_order, finite, mean

SMALLEST_SCALE = 0.3
"""Colours reach their ends here at least: differences within the error must not look like much."""


def measured(job: Job) -> bool:
    """Return whether the job knows the cosine between any two of its tasks."""
    return any(value is not None for row in _pairs([job]) for value in row)


def scale(jobs: Sequence[Job]) -> float:
    """Return the cosine where the colours of all figures of a page reach their ends."""
    values = [
        abs(value)
        for group in by_order(jobs)
        for members in by_arm(group).values()
        for row in _pairs(members)
        for value in finite(row)
    ]
    return min(1.0, max([SMALLEST_SCALE, *(math.ceil(10 * value) / 10 for value in values)]))


def heat_maps(jobs: Sequence[Job], limit: float | None = None) -> str:
    """Return the cosines between updates per arm, mean over its runs, on one colour scale up to ``limit``.

    Rows are the later tasks, columns the earlier ones. The jobs share one order of tasks.
    """
    chosen = {arm: _pairs(members) for arm, members in by_arm(jobs).items()}
    order = [name(task, 18) for task in jobs[0]["order"]]
    if not any(map(measured, jobs)):
        return ""
    limit = limit or scale(jobs)
    pairs, longest = len(order) - 1, max(map(len, order))
    margin = 0.5 + 0.07 * longest
    room = WIDTH - margin - 0.8
    wide, tall, letters = (
        (0.4, 0.3, 8.5) if pairs <= 6 else (0.33, 0.26, 7.5) if pairs <= 10 else (0.3, 0.24, 7)
    )
    # A panel is at least as wide as the name above it.
    panel = max(1.7, pairs * wide + 0.25)
    across = max(1, min(len(chosen), int(room / panel)))
    down = -(-len(chosen) // across)
    across = -(-len(chosen) // down)
    with styled():
        figure, axes = grid(
            len(chosen),
            across,
            margin + 0.8 + across * min(panel, room / across),
            down * (pairs * tall + 0.4) + 0.25 + 0.055 * longest,
            sharex=True,
            sharey=True,
        )
        # Few enough steps to be drawn as such, and an odd number of them: one of its own for 0.
        colours = mpl.colormaps["RdBu"].resampled(41)
        mesh: Any = None
        for axis, (arm, matrix) in zip(axes, chosen.items(), strict=True):
            cells = [[math.nan if value is None else value for value in row] for row in matrix]
            edges = [k - 0.5 for k in range(pairs + 1)]
            mesh = axis.pcolormesh(
                edges, edges, cells, cmap=colours, vmin=-limit, vmax=limit, edgecolor=PAPER, linewidth=0.8
            )
            for i, row in enumerate(cells):
                for j, value in enumerate(row):
                    if math.isfinite(value):
                        axis.text(
                            j,
                            i,
                            _short(value),
                            ha="center",
                            va="center",
                            fontsize=letters,
                            color=readable_on(mesh.to_rgba(value)),
                        )
            axis.set_title(name(arm, 12 + 3 * pairs))
            axis.set_xlim(-0.5, pairs - 0.5)
            axis.set_ylim(pairs - 0.5, -0.5)
            axis.grid(False)
            axis.spines[:].set_visible(False)
        for number, axis in enumerate(axes):
            axis.set_xticks(range(pairs), order[:-1], rotation=35, ha="right", rotation_mode="anchor")
            axis.tick_params(labelbottom=number + across >= len(axes))
        axes[0].set_yticks(range(pairs), order[1:])
        bar = figure.colorbar(
            mesh, ax=axes, aspect=16, fraction=0.025, pad=0.015, shrink=1 / down, anchor=(0.0, 1.0)
        )
        bar.set_label("cosine")
        bar.set_ticks([-limit, 0, limit])
        bar.outline.set_visible(False)  # type: ignore[operator]
        return svg(figure)


def _pairs(jobs: Sequence[Job]) -> Matrix:
    """Return the mean cosine of every later task (rows, from the second) with every earlier one (columns)."""
    tasks = len(jobs[0].get("order") or ())
    return [
        [_mean([_cosine(job, i, j) for job in jobs]) if j < i else None for j in range(tasks - 1)]
        for i in range(1, tasks)
    ]


def _cosine(job: Job, i: int, j: int) -> float | None:
    rows = job.get("interference") or []
    return rows[i][j] if i < len(rows) and j < len(rows[i]) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in finite(values) if abs(value) <= 1]
    return mean(known) if known else None


def _short(value: float) -> str:
    """Return a cosine without the zero before its point."""
    text = f"{value:.2f}"
    return "0" if float(text) == 0 else text.replace("0.", ".").replace("-", "\N{MINUS SIGN}")
