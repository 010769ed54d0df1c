"""A heat map that a benchmark or plugin hands over: named rows and columns, one number per cell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl

from graftwork.report.canvas import PAPER, WIDTH, grid, name, readable_on, styled, svg
from graftwork.report.words import clean

LETTERED = 12
"""Columns up to which every cell says its number."""
TICKS = 30
"""Column names at most; of more, every second, third, ... is written."""


def heat_map(chart: Mapping[str, Any]) -> str:
    """Return the chart as SVG; a cell that is no finite number stays empty. Empty where nothing is finite.

    The colours run from the smallest to the largest value; from minus to plus the largest size where there are both
    signs, so that 0 is in the middle.
    """
    columns = [str(column) for column in chart.get("columns") or ()]
    rows = {
        str(key): [math.nan if value is None else float(value) for value in values]
        for key, values in (chart.get("rows") or {}).items()
    }
    known = [value for values in rows.values() for value in values if math.isfinite(value)]
    if not known or not columns or any(len(values) != len(columns) for values in rows.values()):
        return ""
    low, high = min(known), max(known)
    size = max(abs(low), abs(high))
    signed = low < 0 < high
    low, high = (-size, size) if signed else (low, high if high > low else low + 1)
    with styled():
        figure, (axis,) = grid(1, 1, min(WIDTH, 2.2 + 0.42 * len(columns)), 1.1 + 0.3 * len(rows))
        mesh: Any = axis.pcolormesh(
            [k - 0.5 for k in range(len(columns) + 1)],
            [k - 0.5 for k in range(len(rows) + 1)],
            list(rows.values()),
            cmap=mpl.colormaps["RdBu_r" if signed else "cividis"].resampled(41),
            vmin=low,
            vmax=high,
            edgecolor=PAPER,
            linewidth=0.6,
        )
        if len(columns) <= LETTERED:
            for i, values in enumerate(rows.values()):
                for j, value in enumerate(values):
                    if math.isfinite(value):
                        colour = readable_on(mesh.to_rgba(value))
                        axis.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=7.5, color=colour)
        every = -(-len(columns) // TICKS)
        ticks = range(0, len(columns), every)
        tilt = 35 if max(map(len, columns)) > 3 else 0
        axis.set_xticks(
            ticks, [name(columns[k], 12) for k in ticks], rotation=tilt, ha="right" if tilt else "center"
        )
        axis.set_yticks(range(len(rows)), [name(key, 24) for key in rows])
        axis.invert_yaxis()
        axis.grid(False)
        axis.spines[:].set_visible(False)
        axis.set_xlabel(clean(chart.get("x", "")))
        bar = figure.colorbar(mesh, ax=axis, fraction=0.025, pad=0.015)
        bar.set_label(clean(chart.get("y", "")))
        bar.outline.set_visible(False)  # type: ignore[operator]
        return svg(figure)
