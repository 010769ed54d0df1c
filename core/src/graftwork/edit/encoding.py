"""Requests as tokens: prompt and target in one tokenisation, so that its boundary is where the model would see it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from graftwork.edit.errors import RequestError
from graftwork.edit.requests import Request
from graftwork.evaluate.encoding import pad_token

BUDGET = 1024
"""Tokens, with padding, that go through a model together."""


@dataclass(frozen=True)
class Row:
    """One sequence.

    Attributes:
        ids: its tokens.
        anchor: position of the subject's last token; of the last prompt token where no subject was given.
        start: position of the first token of the target; the length where there is none.
        first: position of the subject's first token.
    """

    ids: tuple[int, ...]
    anchor: int
    start: int
    first: int = 0

    @property
    def last(self) -> int:
        """Position of the last prompt token."""
        return self.start - 1

    @property
    def target(self) -> tuple[int, ...]:
        """The tokens of the target."""
        return self.ids[self.start :]


def joined(prompt: str, target: str) -> str:
    """Return prompt and target as one text: one space between, unless there is white space already."""
    gap = "" if not prompt or prompt[-1].isspace() or target[:1].isspace() else " "
    return prompt + gap + target


def encode(
    tokenizer: Any,
    prompt: str,
    *,
    subject: tuple[int, int] | None = None,
    target: str | None = None,
    where: str = "",
) -> Row:
    """Return prompt and target as tokens of one tokenisation.

    A token belongs to the target when its text reaches beyond the prompt, so a token that holds the end of the prompt
    and the start of the target is the target's.

    Args:
        tokenizer: a fast one: only these tell where a token stands in the text.
        prompt: the text.
        subject: where the subject starts and ends in it.
        target: what follows.
        where: for messages.

    Raises:
        RequestError: no token of the subject or of the target is left, nothing stands before the target, or the
            tokenizer cannot tell where tokens stand.
    """
    text = prompt if target is None else joined(prompt, target)
    if not getattr(tokenizer, "is_fast", False):
        raise RequestError("editing needs a fast tokenizer, which tells where each token stands in the text")
    found = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(found["input_ids"]), [tuple(pair) for pair in found["offset_mapping"]]
    at = f"{where}: " if where else ""
    start = len(ids)
    if target is not None:
        start = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(ids))
        if start == len(ids):
            raise RequestError(f"{at}the target '{target}' has no token")
        # A token that the tokenizer puts at the end, such as <eos>, is nobody's.
        while offsets[-1] == (0, 0) and len(ids) > start + 1:
            ids.pop()
            offsets.pop()
        if start == 0:
            raise RequestError(f"{at}nothing stands before the target '{target}', so nothing predicts it")
    first, anchor = 0, start - 1
    if subject is not None:
        inside = [
            i for i, (a, b) in enumerate(offsets[:start]) if a < b and a < subject[1] and b > subject[0]
        ]
        if not inside:
            raise RequestError(
                f"{at}no token of the subject '{prompt[slice(*subject)]}' stands before the target"
            )
        first, anchor = inside[0], inside[-1]
    return Row(tuple(ids), anchor, start, first)


def encode_request(
    tokenizer: Any, request: Request, *, subject: str | None = None, prefix: str = "", target: bool = True
) -> Row:
    """Return a request's prompt, after ``prefix`` and with another ``subject`` where given, and its target."""
    subject = request.subject if subject is None else subject
    before, after = request.parts
    begin = len(prefix) + len(before)
    return encode(
        tokenizer,
        prefix + before + subject + after,
        subject=(begin, begin + len(subject)),
        target=request.target if target else None,
        where=f"request '{request.id}'",
    )


def rows_of(
    tokenizer: Any,
    request: Request,
    prefixes: Sequence[str] = (),
    *,
    variants: int = 0,
    target: bool = True,
) -> list[Row]:
    """Return the bare prompt, one row per prefix, and one per variant (the first ``variants``), in this order."""
    rows = [encode_request(tokenizer, request, target=target)]
    rows += [encode_request(tokenizer, request, prefix=prefix, target=target) for prefix in prefixes]
    rows += [
        encode_request(tokenizer, request, subject=one, target=target) for one in request.variants[:variants]
    ]
    return rows


def check_lengths(tokenizer: Any, requests: Sequence[Request], longest: int) -> None:
    """Tokenise every request.

    Raises:
        RequestError: a target of more than ``longest`` tokens; also see :func:`encode`.
    """
    for one in requests:
        count = len(encode_request(tokenizer, one).target)
        if count > longest:
            raise RequestError(
                f"request '{one.id}': its target has {count} tokens, and at most {longest} are allowed; shorten it, "
                f"or set max_target_tokens higher"
            )


@dataclass(frozen=True)
class Batch:
    """Rows, padded: ``inputs`` are the arguments of a forward pass; token i of row r stands at ``shift[r] + i``."""

    rows: Sequence[Row]
    inputs: dict[str, Any]
    shift: torch.Tensor

    @property
    def anchors(self) -> torch.Tensor:
        """Positions of the rows' anchors in the batch."""
        return self.shift + torch.tensor([row.anchor for row in self.rows], device=self.shift.device)


def pad(rows: Sequence[Row], tokenizer: Any, model: Any, side: Literal["right", "left"] = "right") -> Batch:
    """Return rows as one batch on the model's device; positions count from each row's first token."""
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad_token(tokenizer), dtype=torch.long)
    mask = torch.zeros_like(ids)
    shift = torch.zeros(len(rows), dtype=torch.long)
    for number, row in enumerate(rows):
        start = length - len(row.ids) if side == "left" else 0
        ids[number, start : start + len(row.ids)] = torch.tensor(row.ids)
        mask[number, start : start + len(row.ids)] = 1
        shift[number] = start
    device = model.get_input_embeddings().weight.device
    inputs: dict[str, Any] = {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "use_cache": False,
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).to(device)
    return Batch(rows, inputs, shift.to(device))


def batches(rows: Sequence[Row], budget: int = BUDGET) -> Iterator[Sequence[Row]]:
    """Yield rows in order, as many together as make at most ``budget`` tokens with padding; one at least."""
    some: list[Row] = []
    longest = 0
    for row in rows:
        if some and max(longest, len(row.ids)) * (len(some) + 1) > budget:
            yield some
            some, longest = [], 0
        some.append(row)
        longest = max(longest, len(row.ids))
    if some:
        yield some
