"""Read JSON and JSON lines: every mistake in one sentence with the file and the line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftwork.errors import UserError


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file with its line ends as ``\\n``, without a byte-order mark.

    Raises:
        UserError: it is not there, cannot be read, or is not UTF-8.
    """
    try:
        return as_text(path.read_bytes(), f"data file '{path}'")
    except FileNotFoundError:
        raise UserError(f"data file '{path}' does not exist") from None
    except OSError as error:
        raise UserError(f"data file '{path}' cannot be read: {error.strerror}") from None


def as_text(raw: bytes, what: str) -> str:
    """Return ``raw`` as text; see :func:`read_text`. ``what`` it is goes into the message."""
    try:
        # Some editors put a byte-order mark in front, which JSON does not allow.
        return raw.removeprefix(codecs.BOM_UTF8).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 (byte {error.start})") from None


def parse_json(text: str, where: str) -> Any:
    """Return the value of ``text``; ``where`` it stands goes into the message.

    Raises:
        UserError: not JSON, or text that is no Unicode.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where}: an escape is half of a surrogate pair; write the character as UTF-8"
            ) from None
    return value


def objects(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where (``name:line``) and what every line of JSONL ``text`` is; nothing where the text is empty.

    Raises:
        UserError: an empty line, broken JSON, or a value that is no object.
    """
    # Not splitlines(): a JSON string may hold U+2028 and other characters that it takes for line ends.
    lines = text.removesuffix("\n").split("\n")
    for number, line in enumerate(lines if any(lines) else [], 1):
        where = f"{name}:{number}"
        if not line.strip():
            raise UserError(f"{where}: an empty line; every line holds one JSON object")
        item = parse_json(line, where)
        if number == 1 and isinstance(item, list):
            raise UserError(f"{where}: a JSON array; a .jsonl file holds one JSON object per line")
        if not isinstance(item, dict):
            raise UserError(f"{where}: a {type_word(item)}, where a JSON object is expected")
        yield where, item


def type_word(value: Any) -> str:
    """Return the word for the type of a JSON value."""
    return "null" if value is None else type(value).__name__
