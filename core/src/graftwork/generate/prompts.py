"""What a model is asked: one text, or a pair of which the second lacks the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.errors import UserError

FIELDS = ("prompt", "contrast_prompt", "context", "question", "messages")


@dataclass(frozen=True)
class Prompt:
    """A text or chat messages, and the same question without its context where a method contrasts the two."""

    main: str | Sequence[Mapping[str, str]]
    contrast: str | Sequence[Mapping[str, str]] | None = None


@dataclass(frozen=True)
class Templates:
    """How a context and a question become the two prompts; ``{context}`` and ``{question}`` are filled in.

    Raises:
        UserError: a placeholder is missing, or the second template shows the context.
    """

    with_context: str = "{context}\n\n{question}"
    without_context: str = "{question}"

    def __post_init__(self) -> None:
        for name, text, needed in (
            ("with_context", self.with_context, ("{context}", "{question}")),
            ("without_context", self.without_context, ("{question}",)),
        ):
            for placeholder in needed:
                if placeholder not in text:
                    raise UserError(f"template {name} lacks {placeholder}: '{text}'")
        if "{context}" in self.without_context:
            raise UserError(
                f"template without_context shows the {{context}} it is to leave out: '{self.without_context}'"
            )

    def fill(self, context: str | None, question: str) -> Prompt:
        """Return the pair; without a context only the second template is used, and there is no contrast."""
        without = self.without_context.replace("{question}", question)
        if context is None:
            return Prompt(without)
        # The question goes in first: a context may contain the word {question}.
        before, _, after = self.with_context.partition("{context}")
        return Prompt(
            before.replace("{question}", question) + context + after.replace("{question}", question), without
        )


def prompt_from_record(
    record: Mapping[str, Any], templates: Templates, *, where: str, chat: bool = False
) -> Prompt:
    """Return the prompt of a record: ``question`` (and ``context``), ``prompt`` (and ``contrast_prompt``), or
    ``messages``. With ``chat``, texts become one user turn each.

    Raises:
        UserError: none or several of these, a wrong type, or an empty text; ``where`` names the record.
    """
    kinds = [name for name in ("prompt", "question", "messages") if name in record]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none of them"
        raise UserError(
            f"{where}: needs one of 'prompt', 'question' (with 'context') or 'messages', has {found}"
        )
    if kinds == ["messages"]:
        return Prompt(_messages(record["messages"], where))
    if kinds == ["prompt"]:
        pair = Prompt(_part(record, "prompt", where), None)
        if record.get("contrast_prompt") is not None:
            pair = Prompt(pair.main, _part(record, "contrast_prompt", where))
    else:
        context = None if record.get("context") is None else _text(record, "context", where)
        pair = templates.fill(context, _text(record, "question", where))
    return as_chat(pair) if chat else pair


def as_chat(prompt: Prompt) -> Prompt:
    """Return the pair with every plain text as one turn of the user."""
    turns = [
        [{"role": "user", "content": part}] if isinstance(part, str) else part
        for part in (prompt.main, prompt.contrast)
    ]
    return Prompt(turns[0] or "", turns[1])


def _part(record: Mapping[str, Any], key: str, where: str) -> Any:
    return _messages(record[key], where) if isinstance(record[key], list) else _text(record, key, where)


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise UserError(f"{where}: '{key}' is {type(value).__name__}, where a text is expected")
    if not value.strip():
        raise UserError(f"{where}: '{key}' is empty; write it, or leave the field out")
    return value


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    good = isinstance(value, list) and value
    if not good or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    ):
        raise UserError(f"{where}: messages are a list of {{'role': ..., 'content': ...}}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]
