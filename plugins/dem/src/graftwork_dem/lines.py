"""A request as one line of tokens: where its event stands, and where its target is predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from graftwork.edit.encoding import encode_request
from graftwork.edit.requests import Request


@dataclass(frozen=True)
class Line:
    """Prompt and target in one tokenisation.

    Attributes:
        ids: T token ids, on the CPU.
        event: positions of the tokens that the event's text stands in.
        predicts: positions whose logits predict the target's tokens, one each.
        targets: the target's token ids.
    """

    ids: torch.Tensor
    event: torch.Tensor
    predicts: torch.Tensor
    targets: torch.Tensor

    @property
    def last(self) -> torch.Tensor:
        """The last event position, as a tensor of one."""
        return self.event[-1:]


def line(tokenizer: Any, request: Request, subject: str | None = None) -> Line:
    """Return the line of a request with ``subject`` (its own where None) in the slot.

    Raises:
        RequestError: no token of the event or the target; see :func:`graftwork.edit.encoding.encode`.
    """
    row = encode_request(tokenizer, request, subject=subject)
    return Line(
        torch.tensor(row.ids),
        torch.arange(row.first, row.anchor + 1),
        torch.arange(row.start, len(row.ids)) - 1,
        torch.tensor(row.target),
    )
