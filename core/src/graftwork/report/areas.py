"""What a method has used up, as its plugin tells (hook charts): stacked areas over the layers, and a table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.colors import to_hex
from matplotlib.patches import Patch

from graftwork.report.canvas import FAINT, PAPER, WIDTH, grid, name, styled, svg
from graftwork.report.summary import Cells, Job, mean
from graftwork.report.words import clean, percent

NAMED_LAYERS = 16
"""So many layers can carry their names; more are numbered."""


@dataclass(frozen=True)
class Chart:
    """One chart of an arm, mean over its runs: ``parts[task][layer]`` is a share (0 to 1)."""

    title: str
    caption: str
    layers: list[str]
    parts: dict[str, list[float]]
    rest: str
    over_runs: str
    """What the values are a mean of, as a sentence for the caption; empty for a single run."""


def charts(jobs: Sequence[Job]) -> list[Chart]:
    """Return the charts of an arm's runs, which share one order of tasks; means where the runs fit together.

    Runs that chose other layers have no mean; the first one then stands for them.
    """
    found = []
    for number, first in enumerate(jobs[0].get("charts") or ()):
        title, layers = str(first.get("title", "")), list(map(str, first.get("layers") or ()))
        alike = [
            chart for job in jobs for chart in job.get("charts") or () if chart.get("title") == first["title"]
        ]
        fitting = [chart for chart in alike if list(map(str, chart.get("layers") or ())) == layers]
        together = len(fitting) == len(alike) == len(jobs)
        members = fitting if together else [first]
        parts = {
            task: [mean([_share(chart, task, layer) for chart in members]) for layer in range(len(layers))]
            for task in _in_order(first.get("parts") or {}, jobs[0].get("order") or ())
        }
        if len(jobs) == 1:
            words = ""
        elif together:
            words = f"Mean over {len(jobs)} runs."
        else:
            words = f"The first of {len(jobs)} runs; the others differ in their layers."
        found.append(
            Chart(
                title or f"chart {number + 1}",
                str(first.get("caption", "")),
                layers,
                parts,
                str(first.get("rest") or "free"),
                words,
            )
        )
    return [chart for chart in found if chart.layers and chart.parts]


def used_cells(chart: Chart) -> Cells:
    """Return, after every task, the mean over the layers: taken by this task, by all so far, and the rest."""
    rows, used = [], 0.0
    for task, values in chart.parts.items():
        share = mean(values)
        used += share
        rows.append([f"after {clean(task)}", percent(share), percent(used), percent(1 - used)])
    return ["mean over layers", "this task %", "used %", f"{clean(chart.rest)} %"], rows


def area_chart(chart: Chart) -> str:
    """Return bands over the layers, one per task in their order, and what is left as a hatched area."""
    count = len(chart.layers)
    tasks = list(chart.parts)
    # A layer is a step of its own: nothing lies between two of them.
    x = [layer - 0.5 for layer in range(count + 1)]
    colours = mpl.colormaps["viridis"]
    with styled():
        figure, axes = grid(
            1, 1, min(WIDTH, max(6.0, 3.5 + 0.28 * count)), max(2.7, 0.9 + 0.2 * (len(tasks) + 1))
        )
        axis = axes[0]
        low = [0.0] * count
        handles: list[Any] = []
        for number, task in enumerate(tasks):
            high = [a + 100 * b for a, b in zip(low, chart.parts[task], strict=True)]
            place = 0.5 if len(tasks) == 1 else 0.18 + 0.72 * number / (len(tasks) - 1)
            handles.append(
                axis.fill_between(
                    x,
                    [*low, low[-1]],
                    [*high, high[-1]],
                    step="post",
                    facecolor=to_hex(colours(place)),
                    edgecolor=PAPER,
                    lw=0.5,
                )
            )
            low = high
        top = max(100.0, *low)
        axis.fill_between(
            x,
            [*low, low[-1]],
            [max(100.0, value) for value in [*low, low[-1]]],
            step="post",
            facecolor="none",
            edgecolor=FAINT,
            hatch="///",
            lw=0,
        )
        handles.append(Patch(facecolor="none", edgecolor=FAINT, hatch="/////", lw=0.6))
        axis.set_xlim(-0.5, count - 0.5)
        axis.set_ylim(0, top)
        axis.set_ylabel("share of the layer, %")
        axis.grid(False)
        labels, common = _layer_names(chart.layers)
        if labels:
            tilt: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
            axis.set_xticks(range(count), labels, **(tilt if max(map(len, labels)) > 3 else {}))
        else:
            every = -(-count // 12)
            numbers = range(0, count, every)
            axis.set_xticks(numbers, [str(n if common else n + 1) for n in numbers])
        axis.set_xlabel(f"layer ({name(common, 60)})" if common else "layer")
        names = [*(f"{n}  {name(task)}" for n, task in enumerate(tasks, 1)), name(chart.rest)]
        # The legend stands as the bands do: the last task on top, below what is left.
        figure.legend(
            handles[::-1],
            names[::-1],
            loc="outside right upper",
            labelcolor=None,
            handlelength=1.4,
            fontsize=9,
        )
        return svg(figure)


def _layer_names(layers: Sequence[str]) -> tuple[list[str], str]:
    """Return what to write below the layers and what they have in common.

    Layers that only differ in a number are written as that number. No names come back where there are too
    many to write; then ``common`` says whether counting from 0 gives the numbers of the model.
    """
    matches = [re.fullmatch(r"(\D*)(\d+)(.*)", layer) for layer in layers]
    patterns = {(match[1], match[3]) for match in matches if match}
    if all(matches) and len(patterns) == 1:
        numbers = [match[2] for match in matches if match]
        common = "{}*{}".format(*next(iter(patterns))).strip("*. ")
        counted = numbers == [str(n) for n in range(len(layers))]
        if len(layers) <= 2 * NAMED_LAYERS:
            return numbers, common
        return [], common if counted else ""
    names = [name(".".join(layer.split(".")[-2:]), 20) for layer in layers]
    return (names if len(layers) <= NAMED_LAYERS else []), ""


def _in_order(parts: Mapping[str, Any], order: Sequence[Any]) -> list[str]:
    known = [str(task) for task in order if str(task) in parts]
    return [*known, *(task for task in parts if task not in known)]


def _share(chart: Mapping[str, Any], task: str, layer: int) -> float:
    values = (chart.get("parts") or {}).get(task) or ()
    value = values[layer] if layer < len(values) else None
    return value if value is not None and math.isfinite(value) and 0 <= value <= 10 else 0.0
