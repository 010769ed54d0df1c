"""``trainer plugins``: what is installed, and what one plugin offers."""

from __future__ import annotations

import click

from graftwork.plugins import discover, find, load_class, options_class

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def list_plugins() -> None:
    """Print one line per installed plugin, from metadata alone."""
    found = discover()
    if not found:
        click.echo("no plugins are installed; for example: pip install graftwork-cl-baselines")
        return
    rows = [("PLUGIN", "PACKAGE", "VERSION")]
    rows += [(info.name, info.distribution, info.version) for info in found.values()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_plugin(name: str) -> None:
    """Print a plugin's package, summary, hooks, options and recipes."""
    from graftwork.hookspecs import GraftworkHooks
    from graftwork.recipes import shipped

    info = find(name)
    plugin_class = load_class(name)
    click.echo(f"{name}  ({info.distribution} {info.version}, {info.entry_point.value})")
    summary = (plugin_class.__doc__ or "").strip().splitlines()
    if summary:
        click.echo(f"  {summary[0]}")
    hooks = [
        hook for hook in vars(GraftworkHooks) if not hook.startswith("_") and hasattr(plugin_class, hook)
    ]
    click.echo(f"\nhooks:   {', '.join(hooks) or 'none'}")
    recipes = [f"{name}:{recipe}" for recipe in shipped(info)]
    click.echo(f"recipes: {', '.join(recipes) or 'none'}")
    fields = options_class(plugin_class).model_fields
    click.echo("\noptions:" if fields else "\noptions: none")
    rows = []
    for field, details in fields.items():
        default = details.get_default(call_default_factory=True)
        shown = "required" if details.is_required() else repr(default)
        bounds = ", ".join(
            f"{sign} {getattr(bound, name)}"
            for bound in details.metadata
            for name, sign in _BOUNDS.items()
            if hasattr(bound, name)
        )
        rows.append((field, shown, (details.description or "") + (f"  [{bounds}]" if bounds else "")))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
    for field, shown, about in rows:
        click.echo(f"  {field.ljust(widths[0])}  {shown.ljust(widths[1])}  {about}".rstrip())
