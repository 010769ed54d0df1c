"""What benchmarks found: a table of the arms for each benchmark, and its line charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

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
    """Return one row per arm: every metric as mean ± standard deviation over runs, and the time it took.

    Arms that were trained before they were measured have the time of that, too.
    """
    names = list(metric_words(jobs))
    arms = by_arm(jobs)
    times = {"train s": "train_seconds", "statistics s": "statistics_seconds", "time s": "eval_seconds"}
    times = {
        head: key for head, key in times.items() if any(job.get(key) for job in jobs) or head == "time s"
    }
    rows = []
    for arm, members in arms.items():
        cells = [_over_runs([job["metrics"].get(key) for job in members]) for key in names]
        took = [mean([float(job.get(key) or 0) for job in members]) for key in times.values()]
        rows.append([clean(arm), *cells, *(f"{value:.0f}" for value in took)])
    return ["method", *names, *times], rows


def together(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Return the charts of one line that several arms have, with a line per arm, mean over its runs."""
    arms = by_arm(jobs)
    points: dict[str, dict[str, dict[float, list[float]]]] = {}
    first: dict[str, Mapping[str, Any]] = {}
    for arm, members in arms.items():
        for job in members:
            for chart in job.get("lines") or ():
                if len(chart.get("series") or ()) != 1:
                    continue
                first.setdefault(chart["title"], chart)
                (line,) = chart["series"].values()
                for x, y in line:
                    at = points.setdefault(chart["title"], {}).setdefault(arm, {})
                    at.setdefault(float(x), []).append(math.nan if y is None else float(y))
    return [
        {
            **first[title],
            "series": {
                arm: [(x, mean(values)) for x, values in sorted(line.items())] for arm, line in lines.items()
            },
        }
        for title, lines in points.items()
        if len(lines) > 1
    ]


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
        if all(x.is_integer() for points in lines.values() for x, _ in points):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
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
