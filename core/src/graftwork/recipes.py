"""Find recipes: a YAML file, or one that an installed plugin ships as ``<package>/recipes/<name>.yaml``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from graftwork.errors import UserError, did_you_mean
from graftwork.plugins import PluginInfo, discover, find


def locate(reference: str) -> Path:
    """Return the file that ``reference`` means: a path, ``<plugin>:<recipe>``, or ``<package>:<recipe>``.

    The package is written without its ``graftwork-``.
    """
    plugin, colon, name = reference.partition(":")
    path = Path(reference)
    if path.exists() or not colon or path.suffix in (".yaml", ".yml"):
        return path
    recipes = shipped(_provider(plugin))
    if name not in recipes:
        known = ", ".join(f"{plugin}:{recipe}" for recipe in recipes) or "none"
        raise UserError(
            f"plugin '{plugin}' ships no recipe '{name}'{did_you_mean(name, recipes)}; it ships: {known}"
        )
    return recipes[name]


def _provider(name: str) -> PluginInfo:
    """Return the plugin ``name``, or any plugin of the package ``graftwork-<name>``: recipes belong to packages."""
    installed = discover()
    of_package = [info for info in installed.values() if info.distribution == f"graftwork-{name}"]
    return of_package[0] if of_package and name not in installed else find(name)


def shipped(info: PluginInfo) -> dict[str, Path]:
    """Return the recipes of a plugin by name, without importing the plugin."""
    spec = importlib.util.find_spec(info.module.partition(".")[0])
    folders = list(spec.submodule_search_locations or []) if spec else []
    return {
        path.stem: path for folder in folders for path in sorted((Path(folder) / "recipes").glob("*.yaml"))
    }
