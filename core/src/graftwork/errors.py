"""The one exception that means "the input is wrong, and here is the cure"."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave us, told in one sentence: what, where, what would be right.

    The command line prints the sentence and exits with code 2, without a traceback.
    """


class PluginError(Exception):
    """A plugin raised inside a hook; the message names both, and ``__cause__`` is the original error."""

    def __init__(self, plugin: str, hook: str, cause: BaseException) -> None:
        super().__init__(f"plugin '{plugin}' failed in hook '{hook}': {type(cause).__name__}: {cause}")
        self.plugin = plugin
        self.hook = hook


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest known word, or an empty string."""
    # Here: the command line starts without it.
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of what ``error`` says, without a full stop, to stand inside a sentence; else its type."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
