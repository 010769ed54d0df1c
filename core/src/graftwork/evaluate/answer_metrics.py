"""How well a written answer matches the gold ones: exact match, F1 (Rajpurkar et al., 2016), substring."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from graftwork.data.labels import normalise

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def squad_words(text: str) -> list[str]:
    """Return the words that count: lower case, without ASCII punctuation and the articles a, an, the."""
    return _ARTICLES.sub(" ", normalise(text)).split()


def exact_match(answer: str, gold: Sequence[str]) -> float:
    """Return 1 where the answer's words are those of a gold answer, else 0."""
    return float(any(squad_words(answer) == squad_words(one) for one in gold))


def f1(answer: str, gold: Sequence[str]) -> float:
    """Return the best F1 (0 to 1) of the words shared with a gold answer; an empty answer scores 0."""
    return max((_f1(squad_words(answer), squad_words(one)) for one in gold), default=0.0)


def contains(answer: str, gold: Sequence[str]) -> float:
    """Return 1 where a gold answer's words stand in the answer, one after another, else 0.

    Words are compared whole: "10" does not stand in "2010".
    """
    words = squad_words(answer)
    return float(any(_inside(squad_words(one), words) for one in gold))


def _inside(part: list[str], whole: list[str]) -> bool:
    size = len(part)
    return bool(part) and any(whole[k : k + size] == part for k in range(len(whole) - size + 1))


def _f1(given: list[str], gold: list[str]) -> float:
    shared = sum((Counter(given) & Counter(gold)).values())
    return 2 * shared / (len(given) + len(gold)) if shared else 0.0
