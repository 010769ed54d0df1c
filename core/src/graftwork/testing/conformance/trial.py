"""What a promise is tried with: the plugin, a tiny model and its runs, and a process that starts commands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork.plugins import PluginInfo

if TYPE_CHECKING:
    from graftwork.testing.composition.compose import Composer
    from graftwork.testing.processes import Warm


class Failed(Exception):
    """A promise is not kept; the text says what to do."""


class Without(Exception):
    """A promise is about something that the plugin does not have."""


@dataclass
class Trial:
    """One plugin under test; ``folder`` is an empty one for its runs, ``tools`` are shared by all plugins."""

    info: PluginInfo
    folder: Path
    tools: Tools

    @property
    def name(self) -> str:
        return self.info.name


Promise = Callable[[Trial], str | None]
"""Returns what was found, or None; raises :class:`Failed`, :class:`Without`, or ``UserError``, a failure, too."""


class Tools:
    """A composer and a process that forks, made when they are first needed and used for all plugins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = contextlib.ExitStack()

    @cached_property
    def composer(self) -> Composer:
        from graftwork.testing.composition.compose import Composer
        from graftwork.train.job import quiet_libraries

        quiet_libraries()
        return Composer(self.folder / "composer")

    @cached_property
    def starter(self) -> Warm:
        from graftwork.testing.processes import warm

        return self._stack.enter_context(warm())

    def close(self) -> None:
        """End the process that forks."""
        self._stack.close()


@contextlib.contextmanager
def tools(folder: Path) -> Iterator[Tools]:
    """Yield tools that are closed afterwards."""
    made = Tools(folder)
    try:
        yield made
    finally:
        made.close()
