"""What benchmarks found: a table of the arms for each benchmark, and its line charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from graftwork.report.canvas import WIDTH, grid, legend, name, series, styled, svg
from graftwork.report.summary import Cells, Job, by_arm, deviation, finite, mean
from graftwork.report.words import clean


def measured(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """Return the jobs of every benchmark, in the order they first appear."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        if job.get("benchmark"):
            groups.setdefault(str(job["benchmark"]), []).append(job)
    return groups


def metric_words(jobs: Sequence[Job]) -> dict[str, str]:
    """Return what the metrics of these jobs are, in words."""
    return {key: str(words) for job in jobs for key, words in (job.get("words") or {}).items()}


def metric_cells(jobs: Sequence[Job]) -> Cells:
    """Return one row per arm: every metric as mean ± standard deviation over runs, and the time it took."""
    names = list(metric_words(jobs))
    arms = by_arm(jobs)
    rows = []
    for arm, members in arms.items():
        cells = [_over_runs([job["metrics"].get(key) for job in members]) for key in names]
        took = mean([float(job.get("eval_seconds") or 0) for job in members])
        rows.append([clean(arm), *cells, f"{took:.0f}"])
    return ["method", *names, "time s"], rows


def line_chart(chart: Mapping[str, Any]) -> str:
    """Return a chart as SVG; a point that is no finite number leaves a gap. Empty where nothing is finite."""
    lines = {
        str(key): [(float(x), float(y) if y is not None else math.nan) for x, y in points]
        for key, points in (chart.get("series") or {}).items()
        if points
    }
    if not any(math.isfinite(y) for points in lines.values() for _, y in points):
        return ""
    with styled():
        figure, (axis,) = grid(1, 1, 0.75 * WIDTH, 3.4)
        handles = []
        for number, points in enumerate(lines.values()):
            look = series(number)
            xs, ys = zip(*points, strict=True)
            (handle,) = axis.plot(
                xs,
                ys,
                color=look.colour,
                linestyle=look.dashes,
                marker=look.marker if len(points) <= 40 else None,
                markersize=4,
                linewidth=1.6,
            )
            handles.append(handle)
        axis.set_xlabel(clean(chart.get("x", "")))
        axis.set_ylabel(clean(chart.get("y", "")))
        legend(figure, handles, [name(key, 40) for key in lines])
        return svg(figure)


def _over_runs(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    if len(finite(known)) < len(known):
        return "nan"
    text = _number(mean(known))
    return f"{text} ± {_number(deviation(known))}" if len(known) > 1 else text


def _number(value: float) -> str:
    size = abs(value)
    text = f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"
    return text if size >= 0.001 or size == 0 else f"{value:.2g}"
