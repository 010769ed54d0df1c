"""What a plugin says about itself: summary, hooks, options, recipes with their claims, provenance, conflicts."""

from __future__ import annotations

import importlib.metadata
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from graftwork.errors import UserError
from graftwork.files import cache_folder, write_json_atomic
from graftwork.plugins import PluginInfo, discover, find, load_class, options_class

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >="}
_PROVENANCE = "| part | comes from |"
"""A README's tables with this head name the source of every equation, default and choice."""


def card(name: str) -> dict[str, Any]:
    """Return all of it, ready for JSON.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    info = find(name)
    plugin_class = load_class(name)
    document = (plugin_class.__doc__ or "").strip().splitlines()
    return {
        "name": name,
        "package": info.distribution,
        "version": info.version,
        "summary": document[0] if document else "",
        "hooks": hooks_of(plugin_class),
        "options": list(option_rows(options_class(plugin_class))),
        "recipes": recipes_of(info),
        "provenance": provenance(info),
        "conflicts": conflicts(name, plugin_class),
    }


def hooks_of(plugin_class: type) -> list[str]:
    """Return the hooks that a plugin implements, in the order of the page of hooks."""
    from graftwork.hookspecs import GraftworkHooks

    return [hook for hook in vars(GraftworkHooks) if not hook.startswith("_") and hasattr(plugin_class, hook)]


def option_rows(options: Any, prefix: str = "") -> Iterator[dict[str, Any]]:
    """Yield name (dotted, where options are nested), type, default, bounds and help of every option."""
    from pydantic import BaseModel

    for field, details in options.model_fields.items():
        kind = details.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from option_rows(kind, f"{prefix}{field}.")
            continue
        bounds = [
            f"{sign} {getattr(bound, attribute)}"
            for bound in details.metadata
            for attribute, sign in _BOUNDS.items()
            if getattr(bound, attribute, None) is not None
        ]
        yield {
            "name": prefix + field,
            "type": type_words(kind),
            "required": details.is_required(),
            "default": None if details.is_required() else details.get_default(call_default_factory=True),
            "bounds": ", ".join(bounds),
            "help": details.description or "",
        }


def type_words(kind: Any) -> str:
    """Return a type as a user would say it: ``float``, ``a | b``, ``list of int``."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return type_words(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        return " | ".join("none" if one is type(None) else type_words(one) for one in inner)
    if origin in (list, tuple, set, frozenset) and inner:
        return f"{origin.__name__} of {type_words(inner[0])}"
    if origin is dict and inner:
        return f"mapping of {type_words(inner[0])} to {type_words(inner[1])}"
    return getattr(kind, "__name__", str(kind))


def recipes_of(info: PluginInfo) -> list[dict[str, Any]]:
    """Return each recipe with its title, sizes, what it expects, and what the last run of it found here."""
    from graftwork.recipes import shipped
    from graftwork.yaml_lines import read

    found = []
    for name, path in shipped(info).items():
        tree = read(path).data
        sizes = tree.get("sizes") or {}
        found.append(
            {
                "name": f"{info.name}:{name}",
                "title": tree.get("title", ""),
                "sizes": list(sizes),
                "expect": list(tree.get("expect") or []),
                "last": last_result(path),
            }
        )
    return found


def keep_result(recipe: Path, results: Mapping[str, Any], root: Path) -> None:
    """Keep what a run of a shipped recipe found, for :func:`last_result`; one per recipe, the last."""
    kept = {
        "size": results["size"],
        "command": results["command"],
        "folder": str(root.resolve()),
        "expect": results["expect"],
        "versions": results["versions"],
    }
    write_json_atomic(_results(recipe), kept)


def last_result(recipe: Path) -> dict[str, Any] | None:
    """Return what the last run of a recipe found on this machine; None where there was none."""
    try:
        return dict(json.loads(_results(recipe).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _results(recipe: Path) -> Path:
    """Return where the result of a shipped recipe is kept, by the package that ships it and its name."""
    return cache_folder() / "claims" / f"{recipe.parent.parent.name}--{recipe.stem}.json"


def provenance(info: PluginInfo) -> list[dict[str, str]]:
    """Return the rows of the README's tables of provenance: part, and where it comes from.

    Where a section of the README that is headed by the plugin's name has one, only of that.
    """
    metadata: Any = importlib.metadata.metadata(info.distribution)
    sections: dict[str, list[dict[str, str]]] = {}
    section, inside = "", False
    for line in str(metadata.get_payload()).splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").strip("` ")
        inside = line.startswith(_PROVENANCE) or (inside and line.startswith("|"))
        if inside and not line.startswith((_PROVENANCE, "|--")):
            part, _, source = line.strip().strip("|").partition(" | ")
            sections.setdefault(section, []).append({"part": part.strip(), "source": source.strip()})
    return sections.get(info.name) or [row for rows in sections.values() for row in rows]


def conflicts(name: str, plugin_class: type) -> list[dict[str, Any]]:
    """Return the hooks of which a run has only one, with the installed plugins that bring the same."""
    from graftwork.hookspecs import EXCLUSIVE

    mine = [hook for hook in EXCLUSIVE if hasattr(plugin_class, hook)]
    if not mine:
        return []
    others: dict[str, list[str]] = {hook: [] for hook in mine}
    for other in discover():
        if other == name:
            continue
        try:
            theirs = load_class(other)
        except UserError:
            # It is broken, which is its own matter.
            continue
        for hook in mine:
            if hasattr(theirs, hook):
                others[hook].append(other)
    return [{"hook": hook, "what": EXCLUSIVE[hook], "with": others[hook]} for hook in mine if others[hook]]


def packages_table(infos: Mapping[str, PluginInfo], links: Path | None = None) -> str:
    """Return packages, their plugins and summaries as a Markdown table.

    A package links to its README where ``links`` (a folder) has one at ``plugins/<package without graftwork->``.
    """
    names: dict[str, list[str]] = {}
    for info in infos.values():
        names.setdefault(info.distribution, []).append(f"`{info.name}`")
    lines = ["| package | plugins | what it is |", "|---|---|---|"]
    for package, plugins in sorted(names.items()):
        place = f"plugins/{package.removeprefix('graftwork-')}/README.md"
        shown = f"[{package}]({place})" if links is not None and (links / place).is_file() else package
        summary = importlib.metadata.metadata(package)["Summary"] or ""
        lines.append(f"| {shown} | {', '.join(plugins)} | {summary} |")
    return "\n".join(lines)
