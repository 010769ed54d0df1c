"""``trainer plugins``: what is installed, what one plugin offers, whether it keeps its promises, and a new one."""

from __future__ import annotations

import json
import shlex
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from graftwork.errors import UserError
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
    import tempfile

    from graftwork.console import Console
    from graftwork.plugins import find
    from graftwork.testing.conformance import check, tools

    for name in names:
        find(name)
    counts = dict.fromkeys(("passed", "failed", "does not apply"), 0)
    with tempfile.TemporaryDirectory(prefix="graftwork-check-") as folder, tools(Path(folder)) as shared:
        for name in names:
            found = check(name, Path(folder, name), static=static, shared=shared, console=Console())
            width = max(len(one.name) for one in found)
            click.echo(f"\n{name}")
            for one in found:
                click.echo(
                    f"  {one.name.ljust(width)}  {one.verdict}{f': {one.detail}' if one.detail else ''}"
                )
                counts[one.verdict] += 1
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    click.echo(f"\n{len(names)} plugin{'s' if len(names) > 1 else ''}: {told}")
    return 1 if counts["failed"] else 0


def plugins_matrix(names: Sequence[str], triples: int, seed: int, markdown: str | None) -> int:
    """Print which plugins go together, and write it as a page; return 1 where a pair is broken, else 0."""
    import tempfile

    from graftwork.console import Console
    from graftwork.files import write_text_atomic
    from graftwork.plugins import find
    from graftwork.testing.composition import Composer, make_matrix
    from graftwork.train.job import quiet_libraries

    every = list(discover())
    if not every:
        raise UserError("no plugins are installed; for example: pip install graftwork-cl-baselines")
    for name in names:
        find(name)
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="graftwork-matrix-") as folder:
        composer = Composer(Path(folder))
        matrix = make_matrix(composer, names or every, every, triples=triples, seed=seed, console=Console())
    click.echo(matrix.text())
    if markdown:
        write_text_atomic(Path(markdown), matrix.markdown())
        click.echo(f"wrote {markdown}")
    return 1 if matrix.broken else 0


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
