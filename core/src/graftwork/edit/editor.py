"""What an editing method is to the core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from graftwork.console import Console
from graftwork.edit.edits import EditSet
from graftwork.edit.requests import Request
from graftwork.edit.statistics import Provider


class Editor(Protocol):
    """Writes requests into a model, and gives back what it wrote.

    Attributes:
        name: of the method.
        uses_statistics: whether it looks at second moments; where not, no corpus is needed.
    """

    name: str
    uses_statistics: bool

    def edit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[Request],
        statistics: Provider,
        *,
        console: Console,
        seed: int,
    ) -> EditSet:
        """Return the edits; the model has the weights it had, bit for bit (:class:`graftwork.edit.draft.Draft`).

        Requests are checked (:func:`graftwork.edit.requests.check_requests`). The same input gives the same bits.

        Raises:
            UserError: see :mod:`graftwork.edit.errors`.
        """
        ...
