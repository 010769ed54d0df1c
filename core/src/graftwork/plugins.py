"""Find plugins (metadata only), import the named ones, construct them, call their hooks.

Discovery reads entry points and imports nothing. A plugin's code runs only after it was named.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

from graftwork.errors import PluginError, UserError, did_you_mean
from graftwork.hookspecs import ENTRY_POINT_GROUP, EXCLUSIVE, PROJECT, GraftworkHooks

if TYPE_CHECKING:
    from pydantic import BaseModel

    from graftwork.data.layouts import Layout
    from graftwork.run import Run


NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
"""What a plugin may be called."""
_told: set[str] = set()
"""Sentences about deprecated hooks that this process has said."""


@dataclass(frozen=True)
class PluginInfo:
    """What an installed plugin's metadata says, without importing it."""

    name: str
    distribution: str
    version: str
    entry_point: importlib.metadata.EntryPoint

    @property
    def module(self) -> str:
        return self.entry_point.module


def discover() -> dict[str, PluginInfo]:
    """Return installed plugins by name.

    Raises:
        UserError: two distributions offer a plugin of the same name, or one a name that none may have.
    """
    found: dict[str, PluginInfo] = {}
    # By distribution: some bring many plugins.
    about: dict[Any, tuple[str, str]] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        if point.dist not in about:
            about[point.dist] = _name_and_version(point.dist)
        name, version = about[point.dist]
        if not NAME.fullmatch(point.name):
            raise UserError(
                f"package '{name}' offers a plugin called {point.name!a}; names are made of small letters, digits "
                f"and hyphens, so that none looks like another: uninstall it"
            )
        previous = found.get(point.name)
        if previous and previous.distribution != name:
            raise UserError(
                f"plugin '{point.name}' is offered by two installed packages, "
                f"'{previous.distribution}' and '{name}'; uninstall one of them"
            )
        found[point.name] = PluginInfo(point.name, name, version, point)
    return dict(sorted(found.items()))


def _name_and_version(distribution: importlib.metadata.Distribution | None) -> tuple[str, str]:
    """Return both from the head of the metadata, whose whole, README and all, would be parsed at every access."""
    found = {"Name": "unknown", "Version": "unknown"}
    text = (
        (distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "")
        if distribution
        else ""
    )
    for line in text.partition("\n\n")[0].splitlines():
        key, _, value = line.partition(": ")
        if key in found:
            found[key] = value.strip()
    return found["Name"], found["Version"]


def find(name: str) -> PluginInfo:
    """Return the installed plugin ``name``, or say which package to install."""
    installed = discover()
    if name in installed:
        return installed[name]
    known = ", ".join(installed) or "none"
    raise UserError(
        f"plugin '{name}' is not installed{did_you_mean(name, installed)}; "
        f"`pip install graftwork-{name}` would provide it if it is published under the usual name "
        f"(installed: {known})"
    )


def load_class(name: str) -> type:
    """Import the plugin ``name`` and return its class. A failing import is told as such."""
    info = find(name)
    try:
        plugin_class = info.entry_point.load()
    except (Exception, SystemExit) as error:
        raise UserError(
            f"plugin '{name}' (package {info.distribution} {info.version}) cannot be imported: "
            f"{type(error).__name__}: {error}; repair or uninstall it"
        ) from error
    if not isinstance(plugin_class, type):
        raise UserError(
            f"plugin '{name}' (package {info.distribution}): its entry point names "
            f"{type(plugin_class).__name__} '{info.entry_point.value}', where a class is expected"
        )
    return plugin_class


def options_class(plugin_class: type) -> type[BaseModel]:
    """Return the plugin's pydantic options model; a plugin without options has an empty one."""
    from pydantic import BaseModel, ConfigDict

    class NoOptions(BaseModel):
        model_config = ConfigDict(extra="forbid")

    return getattr(plugin_class, "Options", NoOptions)


def construct(name: str, options: Mapping[str, Any], where: str = "") -> Any:
    """Return the plugin object for validated ``options``; ``where`` says where they were written."""
    from pydantic import ValidationError

    from graftwork.validation import first_problem

    plugin_class = load_class(name)
    model = options_class(plugin_class)
    try:
        validated = model.model_validate(dict(options))
    except ValidationError as error:
        raise UserError(f"{where}plugin '{name}': {first_problem(error, model)}") from None
    try:
        return plugin_class(validated)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(name, "__init__", error) from error


class Plugins:
    """The plugins of one run, in ``--plugin`` order, and the way to call their hooks."""

    def __init__(self, selected: Mapping[str, Any] | None = None) -> None:
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(GraftworkHooks)
        self.objects: dict[str, Any] = {}
        self._callers: dict[tuple[str, str], Any] = {}
        for name, plugin in (selected or {}).items():
            try:
                self.manager.register(plugin, name=name)
                self.manager.check_pending()
            except pluggy.PluginValidationError as error:
                raise UserError(f"plugin '{name}' does not fit this version of the hooks: {error}") from error
            self.objects[name] = plugin
            self._tell_deprecated(name)

    @classmethod
    def from_options(cls, options: Mapping[str, Mapping[str, Any] | None], where: str = "") -> Plugins:
        """Import and construct the plugins named by the keys of ``options``."""
        return cls({name: construct(name, values or {}, where) for name, values in options.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.objects)

    def implements(self, hook: str) -> list[str]:
        """Return the names of the plugins that implement ``hook``, in order."""
        having = {impl.plugin_name for impl in getattr(self.manager.hook, hook).get_hookimpls()}
        return [name for name in self.objects if name in having]

    def call(self, hook: str, **arguments: Any) -> list[tuple[str, Any]]:
        """Call ``hook`` on every plugin in order; return ``(plugin name, result)`` where not None.

        Raises:
            PluginError: a plugin raised anything else than UserError; its name is in the message.
        """
        results: list[tuple[str, Any]] = []
        for name in self.implements(hook):
            result = self.call_on(name, hook, **arguments)
            if result is not None:
                results.append((name, result))
        return results

    def call_on(self, name: str, hook: str, **arguments: Any) -> Any:
        """Call ``hook`` on the one plugin ``name``; None if it does not implement it."""
        key = (name, hook)
        if key not in self._callers:
            others = [plugin for other, plugin in self.objects.items() if other != name]
            self._callers[key] = self.manager.subset_hook_caller(hook, others)
        try:
            results = self._callers[key](**arguments)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(name, hook, error) from error
        return results[0] if results else None

    def call_one(self, hook: str, **arguments: Any) -> tuple[str, Any] | None:
        """Call a hook of which only one plugin may return something; see ``EXCLUSIVE``.

        Raises:
            UserError: two plugins both returned one; the message names both, the hook, the way out.
        """
        results = self.call(hook, **arguments)
        if len(results) > 1:
            raise _two_of(hook, results[0][0], results[1][0])
        return results[0] if results else None

    def check(self, run: Run) -> None:
        """Let every plugin refuse the run (hook check), before weights are read.

        Raises:
            UserError: a plugin refuses, or two bring a combiner, of which a run has only one.
        """
        self.call("check", run=run)
        both = self.implements("combiner")
        if len(both) > 1:
            raise _two_of("combiner", *both[:2])

    def data_sources(self, run: Run) -> dict[str, Layout]:
        """Return the data layouts that plugins bring, by name.

        Raises:
            UserError: a name is in use already.
        """
        from graftwork.data.layouts import LAYOUTS

        owners, found = dict.fromkeys(LAYOUTS, "graftwork itself"), {}
        for plugin, layouts in self.call("data_sources", run=run):
            for name, layout in layouts.items():
                if name in owners:
                    raise UserError(
                        f"plugin '{plugin}' names a data source '{name}' (hook data_sources), which {owners[name]} "
                        f"has already; leave the plugin out"
                    )
                owners[name], found[name] = f"plugin '{plugin}'", layout
        return found

    def _tell_deprecated(self, name: str) -> None:
        """Say once what the plugin ``name`` uses that is deprecated; pluggy warns developers, and this the user."""
        for sentence in _deprecated(self.manager, name):
            if sentence not in _told and os.environ.get("RANK", "0") == "0":
                from graftwork.console import Console

                _told.add(sentence)
                Console().say(sentence)

    def versions(self) -> dict[str, dict[str, str]]:
        """Return distribution and version of every selected plugin, for the manifest."""
        installed = discover()
        return {
            name: {"distribution": installed[name].distribution, "version": installed[name].version}
            if name in installed
            else {"distribution": "in-process", "version": "0"}
            for name in self.objects
        }


def _deprecated(manager: pluggy.PluginManager, name: str) -> Iterator[str]:
    """Yield a sentence for every deprecated hook that the plugin implements, and every such argument that it takes."""
    for caller in manager.get_hookcallers(manager.get_plugin(name)) or []:
        spec = caller.spec
        if spec is None:
            continue
        if spec.warn_on_impl:
            yield f"{_named(name)} implements the hook '{caller.name}', which is deprecated: {spec.warn_on_impl}"
        mine = [impl for impl in caller.get_hookimpls() if impl.plugin_name == name]
        taken = {argument for impl in mine for argument in (*impl.argnames, *impl.kwargnames)}
        for argument, warning in (spec.warn_on_impl_args or {}).items():
            if argument in taken:
                yield (
                    f"{_named(name)} takes the argument '{argument}' of the hook '{caller.name}', which is deprecated: "
                    f"{warning}"
                )


def _named(name: str) -> str:
    """Return the plugin with its package, where it is installed."""
    info = discover().get(name)
    return f"plugin '{name}' (package {info.distribution} {info.version})" if info else f"plugin '{name}'"


def _two_of(hook: str, first: str, second: str) -> UserError:
    return UserError(
        f"plugins '{first}' and '{second}' cannot be combined: each brings {EXCLUSIVE[hook]} "
        f"(hook {hook}) and a run has only one; leave one of them out"
    )


def generation_notes(run: Run) -> list[str]:
    """Return what the plugins of ``run`` say about the text that was generated, each with its name."""
    found = run.plugins.call("generation_notes", run=run)
    return [f"{name}: {note}" for name, notes in found for note in notes]
