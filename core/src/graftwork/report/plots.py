"""Figures as inline SVG: score matrices, forgetting curves, losses, comparisons."""

from __future__ import annotations

import io
from collections.abc import Sequence


import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from graftwork.report.summary import Job, by_arm, deviation, finite, mean, mean_matrix

# Okabe and Ito's palette: eight colours that people with any colour vision tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "graftwork", "font.family": "sans-serif", "font.size": 10}
MAX_PANELS = 12


def heat_maps(jobs: Sequence[Job]) -> str:
    """Return one accuracy matrix per arm (rows: after which task; columns: tasks), on one colour scale."""
    arms = list(by_arm(jobs).items())[:MAX_PANELS]
    tasks = len(jobs[0]["order"])
    across = min(len(arms), 3 if tasks <= 6 else 1)
    down = -(-len(arms) // across)
    cell = 0.72 if tasks <= 6 else 0.55
    figure = Figure((across * (tasks * cell + 1.7), down * ((tasks + 1) * 0.42 + 1.3)), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for axis in axes.flat[len(arms) :]:
        axis.set_visible(False)
    for axis, (arm, members) in zip(axes.flat, arms, strict=False):
        order, matrix = mean_matrix(members)
        _heat_map(axis, arm, order, matrix)
    return _svg(figure)


def _heat_map(axis: Axes, title: str, order: list[str], matrix: list[list[float | None]]) -> None:
    values = [[float("nan") if value is None else 100 * value for value in row] for row in matrix]
    axis.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if value is not None:
                colour = "black" if value > 0.55 else "white"
                axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=9)
    axis.set_xticks(range(len(order)), order, rotation=30, ha="right")
    axis.set_yticks(range(len(order) + 1), ["untouched", *(f"after {name}" for name in order)])
    axis.set_title(title, fontsize=11, fontweight="bold")
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def forgetting_curves(jobs: Sequence[Job]) -> str:
    """Return one panel per task: its accuracy after every stage, a line per arm, spread over runs shaded."""
    arms = list(by_arm(jobs).items())[: len(COLOURS)]
    order = list(jobs[0]["order"])
    across = min(len(order), 4)
    down = -(-len(order) // across)
    figure = Figure((across * 2.7 + 0.6, down * 2.2 + 0.8), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=True)
    for axis in axes.flat[len(order) :]:
        axis.set_visible(False)
    for column, (axis, task) in enumerate(zip(axes.flat, order, strict=False)):
        axis.axvspan(column + 0.5, column + 1, color="#00000012", lw=0)
        for (arm, members), colour in zip(arms, COLOURS, strict=False):
            stages, centres, spreads = [], [], []
            for stage in range(len(order) + 1):
                values = finite(
                    [job["scores"][stage][column] for job in members if list(job["order"]) == order]
                )
                if values:
                    stages.append(stage)
                    centres.append(100 * mean(values))
                    spreads.append(100 * deviation(values))
            axis.plot(stages, centres, color=colour, marker="o", ms=3.5, lw=1.6, label=arm)
            if any(spreads):
                low = [c - s for c, s in zip(centres, spreads, strict=True)]
                high = [c + s for c, s in zip(centres, spreads, strict=True)]
                axis.fill_between(stages, low, high, color=colour, alpha=0.15, lw=0)
        axis.set_title(task, fontsize=10)
        axis.set_ylim(-3, 103)
        axis.set_xticks(range(len(order) + 1))
        _plain(axis)
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy %")
    for axis in axes[-1]:
        axis.set_xlabel("tasks learned")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6), frameon=False)
    return _svg(figure)


def bars(jobs: Sequence[Job]) -> str:
    """Return average performance and backward transfer per arm, with a dot for every run."""
    arms = by_arm(jobs)
    figure = Figure((9, 0.34 * len(arms) + 1.1), layout="constrained")
    for axis, (metric, title) in zip(
        figure.subplots(1, 2, sharey=True),
        (("ap", "average performance %"), ("bwt", "backward transfer (points)")),
        strict=True,
    ):
        for row, (_, members) in enumerate(arms.items()):
            values = [100 * value for value in finite([job["metrics"].get(metric) for job in members])]
            if values:
                axis.barh(row, mean(values), color=COLOURS[row % len(COLOURS)], alpha=0.75, height=0.62)
                axis.plot(values, [row] * len(values), "o", color="black", ms=3, alpha=0.6)
        axis.set_yticks(range(len(arms)), list(arms))
        axis.axvline(0, color="black", lw=0.8)
        axis.set_title(title, fontsize=10)
        _plain(axis)
    figure.axes[0].invert_yaxis()
    return _svg(figure)


def losses(job: Job) -> str:
    """Return the training loss and every named term over the steps of all tasks."""
    names = list(dict.fromkeys(key for point in job["losses"] for key in point if key.startswith("loss")))
    figure = Figure((9, 1.9 * len(names) + 0.4), layout="constrained")
    axes = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
    offsets: dict[str, int] = {}
    end = 0
    for point in job["losses"]:
        start = offsets.setdefault(point["task"], end)
        end = max(end, start + point["step"])
    for axis, name in zip(axes, names, strict=True):
        for index, (task, offset) in enumerate(offsets.items()):
            points = [p for p in job["losses"] if p["task"] == task and name in p]
            axis.plot(
                [offset + p["step"] for p in points],
                [p[name] for p in points],
                color=COLOURS[index % len(COLOURS)],
                lw=1.3,
                label=task,
            )
            if offset:
                axis.axvline(offset, color="#00000030", lw=0.8)
        axis.set_ylabel(name)
        _plain(axis)
    axes[-1].set_xlabel("optimizer steps")
    if len(offsets) > 1:
        axes[0].legend(frameon=False, ncols=min(len(offsets), 5), fontsize=8)
    return _svg(figure)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, lw=0.6)
    axis.set_axisbelow(True)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with mpl.rc_context(dict(_STYLE)):
        # No date: the same results give the same file.
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
