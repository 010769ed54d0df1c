"""How numbers and names are written, in tables and on the page alike."""

from __future__ import annotations

import unicodedata
from typing import Any


def percent(value: float) -> str:
    """Return a share (0 to 1) in percent with one decimal, without its unit."""
    return _fixed(100 * value, ".1f")


def points(value: float) -> str:
    """Return a difference of shares in percentage points, always with its sign."""
    return _fixed(100 * value, "+.1f")


def count(value: float) -> str:
    """Return a number of things in three digits: ``3.05 M``."""
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            scaled = value / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{suffix}"
    return f"{value:.0f}"


def mebibytes(value: float) -> str:
    """Return bytes in MiB; a little is never written as nothing."""
    size = value / 2**20
    return "<0.01" if 0 < size < 0.01 else f"{size:.2f}" if size < 10 else f"{size:.0f}"


def seconds(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def clean(value: Any) -> str:
    """Return text on one line, without characters that would steer a terminal or break a page."""
    return "".join(_visible(character) for character in str(value))


def clean_lines(value: Any) -> str:
    """Return text like :func:`clean`, line by line."""
    return "\n".join(clean(line) for line in str(value).splitlines())


def short(value: Any, limit: int) -> str:
    """Return text at most ``limit`` columns wide, the cut shown by an ellipsis."""
    text = clean(value)
    if width(text) <= limit:
        return text
    while width(text) >= limit:
        text = text[:-1]
    return text.rstrip() + "…"


def width(text: str) -> int:
    """Return how many columns of a terminal ``text`` takes."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _visible(character: str) -> str:
    return character if character.isprintable() else " " if character.isspace() else "\ufffd"


def _fixed(value: float, form: str) -> str:
    """Format ``value``; a rounded zero has no sign, and what is no number says so."""
    if not abs(value) < 1e6:
        return f"{value:.3g}"
    text = format(value, form)
    return text.lstrip("+-") if float(text) == 0 else text
