"""Generated questions whose whole answer is determined: arithmetic, table look-up, and formatting of words.

An answer is right or wrong to the character, so what a model writes can be measured without a judge. Kinds,
wordings and sizes are ours.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from graftwork.errors import UserError, did_you_mean
from graftwork.inline_settings import read_settings

LARGEST_VALUE = 999
# So many draws in a row without a new question mean that there are hardly any left.
PATIENCE = 2000
_WORDS = """
    apple bark bean bell bird boat book bread cake chair cloud coat corn cup dish door drum fig fish flag fork frog
    goat grape hat horn key kiwi lamp leaf lemon mint moon nut onion pear plum ring road rock rose sand ship snow
    star tree wind wolf
"""
WORDS = tuple(_WORDS.split())


class Question(NamedTuple):
    """A question in one wording: two with the same ``identity`` ask for the same thing."""

    identity: Hashable
    prompt: str
    answer: str


class Counts(BaseModel):
    """How many questions, and which."""

    model_config = ConfigDict(extra="forbid")

    train: int = Field(512, ge=1, le=1_000_000, description="training items")
    test: int = Field(
        256, ge=0, le=1_000_000, description="test items, none of them among the training items"
    )
    seed: int = Field(0, ge=0, description="seed of the questions; the test items depend on no other count")


class Arithmetic(Counts):
    """Two steps of addition, subtraction and multiplication of whole numbers."""

    largest: int = Field(20, ge=2, le=99, description="largest number in a question")


class Table(Counts):
    """Two entries of a small table, added, subtracted or multiplied."""

    entries: int = Field(5, ge=2, le=20, description="entries of a table")
    largest: int = Field(20, ge=2, le=31, description="largest number in a table")


class Format(Counts):
    """Words to write in a given order and form."""

    words: int = Field(3, ge=2, le=6, description="words to write")


Maker = Callable[[random.Random, Any], Question]
KINDS: dict[str, tuple[type[Counts], Maker]] = {}


def exact_items(text: str) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the kind, training items and test items of ``<kind>[,<setting>=<value>...]``.

    Items are ``{"prompt", "completion"}`` of text; a completion begins with a blank and has at most 63 bytes.
    The same text gives the same items everywhere. No question stands twice, in whatever wording.

    Raises:
        UserError: an unknown kind, a bad setting, or more items than there are questions.
    """
    name, _, written = text.partition(",")
    where = f"data 'exact:{text}'"
    if name not in KINDS:
        raise UserError(
            f"{where}: there is no kind '{name}'{did_you_mean(name, KINDS)}; known: {', '.join(KINDS)}"
        )
    options_class, make = KINDS[name]
    options = read_settings(options_class, written, where)
    generator = random.Random(f"{name}/{options.seed}")
    found: dict[Hashable, dict[str, Any]] = {}
    wanted, missed = options.train + options.test, 0
    while len(found) < wanted:
        question = make(generator, options)
        missed = missed + 1 if question.identity in found else 0
        if missed == PATIENCE:
            raise UserError(
                f"{where}: {wanted} items are more than there are different questions with these settings "
                f"(about {len(found)}); ask for fewer, or for larger questions"
            )
        item = {"prompt": question.prompt, "completion": f" {question.answer}"}
        found.setdefault(question.identity, item)
    items = list(found.values())
    # Test items first: they stay the same while the number of training items is varied.
    return name, items[options.test :], items[: options.test]


# ---------------------------------------------------------------------- arithmetic

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}
ORDERS = {"+": "add {}", "-": "subtract {}", "*": "multiply by {}"}
NOUNS = {"+": "sum", "-": "difference", "*": "product"}
BETWEEN = {"+": "plus", "-": "minus", "*": "times"}


def arithmetic(generator: random.Random, options: Arithmetic) -> Question:
    """Return ``(a o b) p c`` or ``a o (b p c)`` in words or signs, with both steps in the answer."""
    while True:
        a, b, c = (generator.randint(1, options.largest) for _ in range(3))
        first, second = generator.choices("+-*", k=2)
        inner_left = generator.random() < 0.5
        wording = generator.randrange(3)
        if inner_left:
            middle = OPERATIONS[first](a, b)
            result = OPERATIONS[second](middle, c)
            steps = f"{a} {first} {b} = {middle}. {middle} {second} {c} = {result}."
            expression = f"({a} {first} {b}) {second} {c}"
            in_words = (
                f"Start with {a}, {ORDERS[first].format(b)}, then {ORDERS[second].format(c)}. What is it?"
            )
        else:
            middle = OPERATIONS[second](b, c)
            result = OPERATIONS[first](a, middle)
            steps = f"{b} {second} {c} = {middle}. {a} {first} {middle} = {result}."
            expression = f"{a} {first} ({b} {second} {c})"
            in_words = f"What is {a} {BETWEEN[first]} the {NOUNS[second]} of {b} and {c}?"
        if all(0 <= value <= LARGEST_VALUE for value in (middle, result)):
            prompt = (f"What is {expression}?", f"Compute {expression}.", in_words)[wording]
            # (2 * 3) + 1 and 1 + (2 * 3) are two questions, but 2 * (1 * 2) has the answer of (1 * 2) * 2.
            return Question(steps, prompt, f"{steps} Answer: {result}")


# ---------------------------------------------------------------------- table look-up


def table(generator: random.Random, options: Table) -> Question:
    """Return a table of letters and numbers and a question about two of them."""
    names = generator.sample("abcdefghijklmnopqrstuvwxyz", options.entries)
    values = {name: generator.randint(1, options.largest) for name in names}
    x, y = generator.sample(names, 2)
    sign = generator.choice("+-*")
    if sign == "-" and values[x] < values[y]:
        x, y = y, x
    a, b = values[x], values[y]
    entry, between = generator.choice([("{}: {}", "; "), ("{} = {}", ", "), ("{} is {}", ", ")])
    listed = between.join(entry.format(name, value) for name, value in values.items())
    asked = generator.choice(
        [
            f"What is {x} {BETWEEN[sign]} {y}?",
            {"+": f"Add {x} and {y}.", "-": f"Subtract {y} from {x}.", "*": f"Multiply {x} by {y}."}[sign],
        ]
    )
    result = OPERATIONS[sign](a, b)
    return Question(
        (frozenset(values.items()), x, sign, y),
        f"{listed}. {asked}",
        f"{x} is {a}, {y} is {b}. {a} {sign} {b} = {result}. Answer: {result}",
    )


# ---------------------------------------------------------------------- lists of words


def _numbered(words: Sequence[str]) -> str:
    return "\n".join(f"{number}. {word}" for number, word in enumerate(words, 1))


# None of them is another but for blanks and line ends, which the score of a task without labels ignores.
FORMS: dict[str, Callable[[Sequence[str]], str]] = {
    "joined by commas": ",".join,
    "in upper case, joined by commas": lambda words: ",".join(words).upper(),
    "as a list with dashes": lambda words: "\n".join(f"- {word}" for word in words),
    "as a numbered list": _numbered,
    "as a JSON array": json.dumps,
}
SEQUENCES: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "in this order": list,
    "in alphabetical order": sorted,
    "from last to first": lambda words: list(reversed(words)),
}


def words(generator: random.Random, options: Format) -> Question:
    """Return an instruction to write some words in one of three orders and five forms."""
    chosen = generator.sample(WORDS, options.words)
    order, arrange = generator.choice(list(SEQUENCES.items()))
    form, write = generator.choice(list(FORMS.items()))
    listed = ", ".join(chosen)
    prompt = generator.choice(
        [f"Write {listed} {order}, {form}.", f"Here are words: {listed}. Write them {order}, {form}."]
    )
    return Question(tuple(chosen), prompt, write(arrange(chosen)))


KINDS |= {"arithmetic": (Arithmetic, arithmetic), "table": (Table, table), "format": (Format, words)}
