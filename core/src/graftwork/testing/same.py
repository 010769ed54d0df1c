"""Whether two runs left the same behind: bytes, numbers, records; only times and what was typed may differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMES = ("written", "peak_memory_bytes", "command")
"""Keys of JSON objects that tell when, how much and by which command; those that end in ``seconds`` do so, too."""


def differences(whole: Path, other: Path) -> list[str]:
    """Return in words what differs between two folders that runs wrote; empty where they are the same.

    Compared are the names of all files and folders, and the contents of all files byte for byte, but JSON (values
    without times), a run's record (events) and pages (only whether they are complete).
    """
    mine, theirs = _names(whole), _names(other)
    found = [f"'{name}' is missing" for name in sorted(mine - theirs)]
    found += [f"'{name}' is left over" for name in sorted(theirs - mine)]
    for name in sorted(mine & theirs):
        path = whole / name
        if path.is_file():
            read = _reader(path)
            try:
                what = _different(read(path), read(other / name))
            except ValueError:
                what = " cannot be read"
            if what is not None:
                found.append(f"'{name}'{what}")
    return found


def unfinished(folder: Path) -> list[str]:
    """Return what is there below ``folder`` of files that were being written."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.part"))


def _names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _reader(path: Path) -> Callable[[Path], Any]:
    if path.name == "metrics.jsonl":
        return lambda file: [_timeless(json.loads(line)) for line in file.read_text().splitlines()]
    if path.name == "adapter_config.json":
        return lambda file: _unordered(json.loads(file.read_text()))
    if path.suffix == ".json":
        return lambda file: _timeless(json.loads(file.read_text()))
    if path.suffix == ".html":
        return lambda file: file.read_text().rstrip().endswith("</html>")
    return Path.read_bytes


def _unordered(config: dict[str, Any]) -> dict[str, Any]:
    """PEFT holds the names of modules in sets and writes them in any order."""
    return {key: sorted(one) if isinstance(one, list) else one for key, one in config.items()}


def _different(one: Any, other: Any, place: str = "") -> str | None:
    """Return in words where two values differ first; None where they are the same."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(f"{place}.{key}", one[key], other[key]) for key in one]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(f"{place}[{index}]", *pair) for index, pair in enumerate(zip(one, other, strict=True))]
    else:
        return None if one == other else f" differs{f' at {place}' if place else ''}"
    return next((what for p, a, b in pairs if (what := _different(a, b, p)) is not None), None)


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _timeless(entry)
            for key, entry in value.items()
            if not (key.endswith("seconds") or key in TIMES)
        }
    return [_timeless(entry) for entry in value] if isinstance(value, list) else value
