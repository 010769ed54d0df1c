"""The recipes of a plugin that run in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftwork.plugins import PluginInfo
from graftwork.recipe import Recipe, load
from graftwork.recipes import shipped
from graftwork.yaml_lines import read

SMOKE = "smoke"


def sizes_of(path: Path) -> dict[str, Any]:
    """Return the sizes of a recipe by name."""
    return read(path).data.get("sizes") or {}


def smoke_recipes(info: PluginInfo) -> Iterator[tuple[str, Recipe]]:
    """Yield name and recipe of all that a plugin ships with a size ``smoke``, or without sizes."""
    for name, path in shipped(info).items():
        sizes = sizes_of(path)
        if not sizes or SMOKE in sizes:
            yield name, load(path, size=SMOKE if sizes else None)
