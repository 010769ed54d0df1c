"""Plugins that implement every hook of one version; what was called is kept in :data:`CALLS`."""

from __future__ import annotations

from typing import Any

CALLS: list[tuple[str, Any]] = []
"""Hook, and what it saw, in the order of the calls."""


def saw(hook: str, what: Any = None) -> None:
    """Keep that ``hook`` was called."""
    CALLS.append((hook, what))


def seen(hook: str) -> list[Any]:
    """Return what ``hook`` saw at each of its calls."""
    return [what for name, what in CALLS if name == hook]
