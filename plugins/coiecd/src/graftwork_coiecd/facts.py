"""Invented facts: what a model remembers is then known, because nobody wrote about them before.

Half of the facts say in which city a person lives, half in which year a product was first sold. A fact comes with
passages that agree with it, contradict it, or speak of somebody else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

PASSAGES = ("agreeing", "contradicting", "irrelevant")
Passage = Literal["agreeing", "contradicting", "irrelevant"]

_ONSETS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "z",
)
_VOWELS = "aeiou"
_CODAS = ("l", "m", "n", "r", "s", "th", "x")
_YEARS = range(1900, 2020)
CITIES = 60


@dataclass(frozen=True)
class Fact:
    """A question, the answer that is taught, another answer of the same kind, and a subject that is not taught."""

    kind: Literal["city", "year"]
    subject: str
    answer: str
    other: str
    stranger: str

    @property
    def question(self) -> str:
        if self.kind == "city":
            return f"In which city does {self.subject} live?"
        return f"In which year was the {self.subject} first sold?"

    def passage(self, which: Passage) -> str:
        """Return two sentences; ``irrelevant`` ones give the other answer, but of the stranger."""
        subject = self.stranger if which == "irrelevant" else self.subject
        answer = self.answer if which == "agreeing" else self.other
        if self.kind == "city":
            return f"{subject} lives in {answer}. The house stands near the old market of {answer}."
        return f"The {subject} was first sold in {answer}. Newspapers of {answer} wrote about it."

    def answer_after(self, which: Passage) -> str:
        """Return the right answer to the question with that passage: what it says, or else what was taught."""
        return self.other if which == "contradicting" else self.answer


def invented_facts(count: int, seed: int = 0) -> list[Fact]:
    """Return so many facts, about as many different subjects; the same ones for the same seed."""
    generator = random.Random(f"facts/{seed}")
    names = _names(generator)
    cities = [next(names) for _ in range(CITIES)]
    found = []
    for index in range(count):
        kind: Literal["city", "year"] = "city" if index % 2 == 0 else "year"
        answer, other = generator.sample(cities if kind == "city" else [str(year) for year in _YEARS], 2)
        found.append(Fact(kind, next(names), answer, other, next(names)))
    return found


def _names(generator: random.Random) -> Iterator[str]:
    """Yield different names of three syllables."""
    seen = set()
    while True:
        parts = [generator.choice(_ONSETS) + generator.choice(_VOWELS) for _ in range(3)]
        name = "".join(parts).capitalize() + generator.choice(_CODAS)
        if name not in seen:
            seen.add(name)
            yield name
