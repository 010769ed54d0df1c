"""``trainer plugins``: what is installed, what one plugin offers, whether it keeps its promises, and a new one."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from graftwork.plugins import discover


def list_plugins(as_json: bool, markdown: bool) -> None:
    """Print one line per installed plugin, from metadata alone."""
    found = discover()
    if as_json:
        rows = [
            {"name": info.name, "package": info.distribution, "version": info.version}
            for info in found.values()
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    if not found:
        click.echo("no plugins are installed; for example: pip install graftwork-cl-baselines")
        return
    if markdown:
        from graftwork.card import packages_table

        click.echo(packages_table(found, Path()))
        return
    table = [("PLUGIN", "PACKAGE", "VERSION")]
    table += [(info.name, info.distribution, info.version) for info in found.values()]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_plugin(name: str, as_json: bool) -> None:
    """Print a plugin's package, summary, hooks, options, recipes with their claims, provenance and conflicts."""
    from graftwork.card import card

    found = card(name)
    if as_json:
        click.echo(json.dumps(found, indent=2, default=str))
        return
    click.echo(f"{name}  ({found['package']} {found['version']})")
    if found["summary"]:
        click.echo(f"  {found['summary']}")
    click.echo(f"\nhooks:   {', '.join(found['hooks']) or 'none'}")
    click.echo(f"recipes: {', '.join(recipe['name'] for recipe in found['recipes']) or 'none'}")
    for conflict in found["conflicts"]:
        _wrapped(
            f"a run has one {conflict['what']} ({conflict['hook']}), so not with: {', '.join(conflict['with'])}"
        )
    click.echo("\noptions:" if found["options"] else "\noptions: none")
    _options(found["options"])
    for recipe in found["recipes"]:
        _claims(recipe)
    if found["provenance"]:
        click.echo("\nwhere it comes from:")
        for row in found["provenance"]:
            _wrapped(f"{row['part']}: {row['source']}", "  ", "    ")


def new_plugin(name: str, kind: str, output: str | None) -> None:
    """Write the distribution of a new plugin, and say what to do with it."""
    from graftwork.scaffold import KINDS, create

    folder = create(name, kind, Path(output) if output else None)
    _wrapped(f"{folder} holds a plugin that works as it is, for you to change: {KINDS[kind]}")
    click.echo(f"  pip install -e {shlex.quote(str(folder))}")
    click.echo(f"  trainer plugins check {name}")


def check_plugins(names: Sequence[str], static: bool) -> int:
    """Print a verdict for every promise of each plugin; return 0 where none failed, else 1."""
    from graftwork.console import Console
    from graftwork.testing.conformance import check

    failed = 0
    for name in names:
        with tempfile.TemporaryDirectory(prefix="graftwork-check-") as folder:
            found = check(name, Path(folder), static=static, console=Console())
        width = max(len(one.name) for one in found)
        click.echo(f"\n{name}")
        for one in found:
            click.echo(f"  {one.name.ljust(width)}  {one.verdict}{f': {one.detail}' if one.detail else ''}")
        failed += sum(one.verdict == "failed" for one in found)
    click.echo(f"\n{failed} failed" if failed else "\nnothing failed")
    return 1 if failed else 0


def recipe_schema() -> None:
    """Print the JSON schema of recipes, with the options of all installed plugins."""
    from graftwork.schema import schema

    click.echo(json.dumps(schema(), indent=2, default=str))


def _options(rows: list[dict[str, Any]]) -> None:
    """Print options, each with its help below it where the line would be too long."""
    names = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        default = "required" if row["required"] else f"= {_plain(row['default'])}"
        bounds = f"  [{row['bounds']}]" if row["bounds"] else ""
        click.echo(f"  {row['name'].ljust(names)}  {row['type']}  {default}{bounds}")
        if row["help"]:
            indent = " " * (names + 4)
            _wrapped(row["help"], indent, indent)


def _claims(recipe: dict[str, Any]) -> None:
    """Print what a recipe expects, and what its last run here found."""
    if not recipe["expect"]:
        return
    last = recipe["last"]
    verdicts = {one["text"]: one for one in last["expect"]} if last else {}
    when = f"last run here: size {last['size'] or 'only one'}" if last else "not run here"
    click.echo(f"\n{recipe['name']}  {recipe['title']}  ({when})")
    for text in recipe["expect"]:
        verdict = verdicts.get(text)
        click.echo(f"  {(verdict['verdict'] if verdict else '').ljust(12)}  {text}".rstrip())


def _plain(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _wrapped(text: str, first: str = "", rest: str = "  ") -> None:
    """Print a text in the width of the terminal, its first line indented by ``first`` and all others by ``rest``."""
    width = min(120, shutil.get_terminal_size().columns)
    click.echo(textwrap.fill(text, width, initial_indent=first, subsequent_indent=rest))
