"""The training items as tokens: what is asked, and the target answer as a player would have written it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.errors import UserError
from graftwork.evaluate.encoding import encode_prompt
from graftwork.generate.stopping import until_end


@dataclass(frozen=True)
class Item:
    """A prompt (text or chat messages) with its target answer.

    ``index`` is its place in the data. ``target_ids`` end with the token that ends a written answer.
    """

    index: int
    prompt: Any
    target: str
    prompt_ids: list[int]
    target_ids: list[int]


def encode_items(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any, *, max_length: int | None, what: str
) -> tuple[list[Item], list[str]]:
    """Return the items of ``rows`` (``prompt`` and ``completion``) that fit ``max_length`` tokens, and notes.

    ``what`` names the data in messages. Notes tell of items left out and of prompts that stand there twice.

    Raises:
        UserError: a row without prompt or answer, with an empty answer, or no row that fits.
    """
    found, long, prompts = [], 0, Counter[str]()
    for index, row in enumerate(rows):
        where = f"{what}, item {index}"
        item = _encode(row, tokenizer, index, where)
        prompts[json.dumps(item.prompt, sort_keys=True)] += 1
        if max_length is not None and len(item.prompt_ids) + len(item.target_ids) > max_length:
            long += 1
        else:
            found.append(item)
    if not found:
        raise UserError(
            f"{what}: no prompt fits train.max_length = {max_length} together with its answer; raise it"
            if long
            else f"{what} has no items; self-play needs prompts with answers"
        )
    notes = []
    if long:
        notes.append(
            f"{what}: {long} items are left out, since prompt and answer are longer than train.max_length "
            f"= {max_length}"
        )
    twice = sum(count - 1 for count in prompts.values())
    if twice:
        notes.append(
            f"{what}: {twice} prompts stand there more than once; each is answered as often as it stands there"
        )
    return found, notes


def text_of(completion: Any) -> str:
    """Return the text of an answer: a string, or chat messages of the assistant."""
    if isinstance(completion, str):
        return completion.strip()
    return "\n".join(str(message.get("content") or "") for message in completion).strip()


def _encode(row: Mapping[str, Any], tokenizer: Any, index: int, where: str) -> Item:
    for key in ("prompt", "completion"):
        if key not in row:
            raise UserError(f"{where} has no '{key}'; self-play needs prompts with answers")
    target = text_of(row["completion"])
    if not target:
        raise UserError(f"{where}: the answer is empty; self-play learns from prompts with answers")
    try:
        asked = encode_prompt(tokenizer, row["prompt"])
        if isinstance(row["prompt"], str):
            answer = tokenizer(row["completion"], add_special_tokens=False, verbose=False)["input_ids"]
            if tokenizer.eos_token_id is not None:
                answer = [*answer, tokenizer.eos_token_id]
        else:
            asked, answer = _chat(tokenizer, row, asked)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    end = tokenizer.eos_token_id
    # A template may write on after the end, such as a line break: no player does.
    return Item(index, row["prompt"], target, asked, until_end(answer, () if end is None else (end,)))


def _chat(tokenizer: Any, row: Mapping[str, Any], asked: list[int]) -> tuple[list[int], list[int]]:
    """Return prompt and answer tokens of a conversation, which a template renders as a whole."""
    messages: Sequence[Any] = [*row["prompt"], *row["completion"]]
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    if whole[: len(asked)] != asked:
        raise UserError(
            "the chat template writes the prompt otherwise once an answer follows, so that written and target "
            "answers would begin differently; use data.prompt: plain, or another template"
        )
    return asked, whole[len(asked) :]
