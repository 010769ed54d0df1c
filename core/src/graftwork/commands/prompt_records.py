"""What ``trainer generate`` is asked: flags, or the lines of a JSONL file."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.data.json_lines import as_text, objects, read_text
from graftwork.errors import UserError
from graftwork.generate.output import line_fields
from graftwork.generate.prompts import Prompt, Templates, as_chat, prompt_from_record


@dataclass(frozen=True)
class Record:
    """What is asked, and what stands beside it in the output."""

    where: str
    fields: dict[str, Any]
    prompt: Prompt


def read_records(
    prompt: str | None,
    source: str | None,
    context: str | None,
    question: str | None,
    templates: Templates,
) -> list[Record]:
    """Return what the flags ask, or the records of the JSONL file ``source``; ``-`` is standard input.

    Raises:
        UserError: no flag or too many, a file that cannot be read, a record that asks nothing.
    """
    given = [
        flag
        for flag, value in (("--prompt", prompt), ("--input", source), ("--question", question))
        if value is not None
    ]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise UserError(f"generate needs one of --prompt, --input or --question, got {found}")
    if context is not None and question is None:
        raise UserError(f"--context goes with --question, not with {given[0]}")
    if source is not None:
        return _records_of(source, templates)
    if prompt is not None:
        text = as_text(_standard_input(), "standard input").removesuffix("\n") if prompt == "-" else prompt
        if not text.strip():
            raise UserError("the prompt is empty; write something after --prompt")
        fields = {"prompt": text}
    else:
        fields = {"question": question} if context is None else {"context": context, "question": question}
    where = "the command line"
    return [Record(where, dict(fields), prompt_from_record(fields, templates, where=where))]


def _records_of(source: str, templates: Templates) -> list[Record]:
    if source == "-":
        name = "standard input"
        text = as_text(_standard_input(), name)
    else:
        name, text = source, read_text(Path(source))
    records = [
        Record(where, line_fields(record, where), prompt_from_record(record, templates, where=where))
        for where, record in objects(text, name)
    ]
    if not records:
        raise UserError(f'{name} is empty; expected one JSON object per line, such as {{"prompt": "..."}}')
    return records


def _standard_input() -> bytes:
    buffer = getattr(sys.stdin, "buffer", None)
    return buffer.read() if buffer is not None else sys.stdin.read().encode()


def as_asked(records: Sequence[Record], tokenizer: Any, ref: str, plain: bool) -> list[Prompt]:
    """Return the prompts, through the chat template where there is one and ``plain`` does not leave it out.

    Raises:
        UserError: chat messages without a template.
    """
    chat = bool(tokenizer.chat_template) and not plain
    for record in records:
        if not chat and not all(
            isinstance(part, str | None) for part in (record.prompt.main, record.prompt.contrast)
        ):
            reason = "which --plain leaves out" if plain else f"which the tokenizer of '{ref}' does not have"
            raise UserError(f"{record.where}: messages need a chat template, {reason}; write a 'prompt'")
    return [as_chat(record.prompt) if chat else record.prompt for record in records]


def digest(records: Sequence[Record]) -> str:
    """Return a hash of everything that is asked."""
    text = json.dumps([one.fields for one in records], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
