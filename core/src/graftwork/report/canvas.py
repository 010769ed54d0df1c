"""What all figures share: colours that follow the page, text that stays text, the same bytes each time."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from graftwork.report.words import short

WIDTH = 11.0
"""Inches (of 72 SVG points) of the widest figure; the page shows it at about its own size."""

INK, FAINT, GRID, PAPER = "#1b1f24", "#5f6874", "#dfe3e8", "#fefefe"
# After Okabe and Ito: eight colours that people with any colour vision tell apart.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#2a2a2a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.4, 1.2, 1.4)))
"""Line styles, one for every round through the colours."""
VARIABLES = {
    INK: "--ink",
    FAINT: "--faint",
    GRID: "--line",
    PAPER: "--paper",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, 1)},
}
"""The page's CSS variable behind every colour: this is how figures follow a dark page."""

_COLOUR = re.compile("|".join(VARIABLES), re.IGNORECASE)
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "graftwork",
    "text.parse_math": False,  # a task may be called "$x$"
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.formatter.useoffset": False,
    "hatch.linewidth": 0.35,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@contextmanager
def styled() -> Iterator[None]:
    """Set the style for the figures drawn inside; matplotlib's own settings are left as they were."""
    with mpl.rc_context(cast(Any, _STYLE)), warnings.catch_warnings():
        # The browser has the letters that the font used for measuring lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def grid(panels: int, across: int, width: float, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``panels`` axes, ``across`` in a row; sizes in inches."""
    down = -(-panels // across)
    figure = Figure((width, height), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False, **shared).flat)
    for axis in axes[panels:]:
        axis.remove()
    return figure, axes[:panels]


@dataclass(frozen=True)
class Look:
    """What tells an arm from the others in every figure of a page."""

    colour: str
    marker: str
    dashes: Any


def series(arm_number: int) -> Look:
    """Return the look of an arm by its place among all arms.

    From the ninth on colours come again, with another marker and another line.
    """
    turn, place = divmod(arm_number, len(SERIES))
    return Look(SERIES[place], MARKERS[(place + 3 * turn) % len(MARKERS)], DASHES[turn % len(DASHES)])


def readable_on(colour: Sequence[float]) -> str:
    """Return the text colour of more contrast on ``colour`` (relative luminance after WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#0a0a0a" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"


def legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Write the names of the lines above the panels."""
    # matplotlib takes a name that starts with "_" for its own; an invisible letter keeps it.
    texts = [f"\u2060{name}" if name.startswith("_") else name for name in names]
    columns = max(1, min(len(texts), int(88 / (6 + max(map(len, texts), default=0)))))
    figure.legend(handles, texts, loc="outside upper left", ncols=columns, handlelength=1.8)


def name(value: object, limit: int = 24) -> str:
    """Return the name of an arm or task as figures write it."""
    return short(value, limit)


def svg(figure: Figure) -> str:
    """Return the figure as an SVG element: no dates, no scripts, no outside references."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace("xlink:href", "href")
    text = re.sub(r"font-family: [^;\"]+", "font-family: system-ui, sans-serif", text)
    text = re.sub(r"font: ((?:[\w.]+ )*[\d.]+px) [^;\"]+", r"font: \1 system-ui, sans-serif", text)
    return re.sub(r'style="[^"]*"', _follow_page, text)


def _follow_page(style: re.Match[str]) -> str:
    return _COLOUR.sub(lambda match: f"var({VARIABLES[match[0].lower()]}, {match[0].lower()})", style[0])
