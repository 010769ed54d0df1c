"""Whether an expert's tokenizer gives its tokens the base's numbers."""

from __future__ import annotations

import json
from pathlib import Path

FILE = "tokenizer.json"


def other_tokens(expert: str, folder: Path, base: Path) -> list[str]:
    """Return a sentence where a number means one token to the expert and another to the base.

    Tokens that only one of them has are no obstacle, and folders without a tokenizer say nothing.
    """
    try:
        mine, theirs = (one / FILE for one in (folder, base))
        if mine.read_bytes() == theirs.read_bytes():
            return []
        first, second = _tokens(mine), _tokens(theirs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    different = [number for number in first.keys() & second.keys() if first[number] != second[number]]
    if not different:
        return []
    number = min(different)
    return [
        f"expert '{expert}' has another tokenizer than the base: {len(different)} numbers mean other tokens, the first "
        f"{number} ('{first[number]}', the base's '{second[number]}'); was it made from this base?"
    ]


def _tokens(path: Path) -> dict[int, str]:
    """Return a tokenizer's tokens by their numbers."""
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        found = {number: token for token, number in vocabulary.items()}
    else:
        # Unigram models list tokens with their scores.
        found = {number: entry[0] for number, entry in enumerate(vocabulary)}
    return found | {entry["id"]: entry["content"] for entry in content.get("added_tokens") or []}
