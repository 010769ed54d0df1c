"""What can be wrong with an edit; every one is a :class:`graftwork.errors.UserError`."""

from __future__ import annotations

from graftwork.errors import UserError


class RequestError(UserError):
    """A request that cannot be made: which one, and why."""


class StatsMismatchError(UserError):
    """Statistics of another model, module, tokenizer or shape."""


class StatsError(UserError):
    """Second moments that cannot be solved with."""


class LocalizationError(UserError):
    """No place to write to was found."""


class ArchitectureError(UserError):
    """A model whose places cannot be told by its structure, or whose weights cannot be edited."""


class UnsafeEditError(UserError):
    """A change that is no number, or is larger than an edit may be; nothing was written."""
