"""Answers as they are compared: the same text after case, punctuation and blanks are taken away."""

from __future__ import annotations

import string

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Return ``text`` in lower case without ASCII punctuation and with single blanks."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def label_problem(labels: list[str]) -> str | None:
    """Return what is wrong with the first label that scoring could not tell from others, or None."""
    seen: dict[str, str] = {}
    for label in labels:
        key = normalise(label)
        if not key:
            # An empty answer would count as right.
            return (
                f"the label '{label}' is empty once punctuation is ignored, as in scoring; write it as a word"
            )
        if key in seen:
            return (
                f"the labels '{seen[key]}' and '{label}' are the same once case and punctuation are ignored, "
                f"as in scoring"
            )
        seen[key] = label
    return None
