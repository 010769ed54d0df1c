"""The conformance kit: whether a plugin keeps the promises that users and other plugins rely on.

``trainer plugins check NAME`` runs :func:`check`; a test of a plugin's own may do so, too. What fails says what to do.
Two class attributes of a plugin help: ``tiny``, options under which it works on a random model of four layers, and
``neutral``, options at which it changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from graftwork.console import Console
from graftwork.errors import PluginError, UserError
from graftwork.plugins import find
from graftwork.testing.composition.trail import Broken
from graftwork.testing.conformance.running import RUNNING
from graftwork.testing.conformance.static import STATIC
from graftwork.testing.conformance.trial import Failed, Promise, Tools, Trial, Without, tools

Verdict = Literal["passed", "failed", "does not apply"]


@dataclass(frozen=True)
class Check:
    """What came out of one promise: its name, the verdict, and what to do about it where it failed."""

    name: str
    verdict: Verdict
    detail: str = ""


def check(
    name: str,
    folder: Path,
    *,
    static: bool = False,
    shared: Tools | None = None,
    console: Console | None = None,
) -> list[Check]:
    """Return a verdict for every promise.

    Args:
        name: of an installed plugin.
        folder: an empty one, where it is run.
        static: leave out what runs a model.
        shared: tools that other plugins are checked with, too.
        console: shows a bar.

    Raises:
        UserError: the plugin is not installed.
    """
    info = find(name)
    promises = [*STATIC, *(() if static else RUNNING)]
    found: list[Check] = []
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tools(folder) as own,
        (console or Console(enabled=False)).bar(len(promises), f"check {name}", "check") as bar,
    ):
        trial = Trial(info, folder, shared or own)
        for title, promise in promises:
            found.append(_verdict(title, promise, trial))
            bar.update(1)
    return found


def _verdict(title: str, promise: Promise, trial: Trial) -> Check:
    try:
        return Check(title, "passed", promise(trial) or "")
    except Without as reason:
        return Check(title, "does not apply", str(reason))
    except (Failed, UserError, PluginError, Broken) as reason:
        return Check(title, "failed", str(reason))


__all__ = ["Check", "Tools", "Verdict", "check", "tools"]
