"""Generated questions: every answer is worked out again from the prompt's own words."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
from graftwork.data.exact_answers import KINDS, WORDS, exact_items
from graftwork.data.layouts import read_tasks, task_names
from graftwork.data.options import DataOptions
from graftwork.data.stream import build_stream
from graftwork.errors import UserError
from hypothesis import given, settings
from hypothesis import strategies as st

SIGN = {"plus": "+", "minus": "-", "times": "*", "add": "+", "subtract": "-", "multiply": "*"}


def worked_out(left: str | int, sign: str, right: str | int) -> int:
    left, right = int(left), int(right)
    return left + right if sign == "+" else left - right if sign == "-" else left * right


def two_steps(first: tuple[Any, str, Any], turn: Callable[[int], tuple[Any, str, Any]]) -> str:
    middle = worked_out(*first)
    second = turn(middle)
    last = worked_out(*second)
    steps = " ".join(map(str, first)) + f" = {middle}. " + " ".join(map(str, second)) + f" = {last}."
    return f"{steps} Answer: {last}"


def solve_arithmetic(prompt: str) -> str:
    """Return the answer from the text of the prompt alone."""
    number = r"(\d+)"
    if found := re.search(rf"\({number} ([-+*]) {number}\) ([-+*]) {number}", prompt):
        a, first, b, second, c = found.groups()
        return two_steps((a, first, b), lambda middle: (middle, second, c))
    if found := re.search(rf"{number} ([-+*]) \({number} ([-+*]) {number}\)", prompt):
        a, first, b, second, c = found.groups()
        return two_steps((b, second, c), lambda middle: (a, first, middle))
    if found := re.fullmatch(
        rf"Start with {number}, (\w+)(?: by)? {number}, then (\w+)(?: by)? {number}\. What is it\?", prompt
    ):
        a, first, b, second, c = found.groups()
        return two_steps((a, SIGN[first], b), lambda middle: (middle, SIGN[second], c))
    found = re.fullmatch(
        rf"What is {number} (plus|minus|times) the (sum|difference|product) of {number} and {number}\?",
        prompt,
    )
    assert found, prompt
    a, outer, inner, b, c = found.groups()
    sign = {"sum": "+", "difference": "-", "product": "*"}[inner]
    return two_steps((b, sign, c), lambda middle: (a, SIGN[outer], middle))


def solve_table(prompt: str) -> str:
    listed, _, asked = prompt.partition(". ")
    values = dict(re.findall(r"([a-z])(?:: | = | is )(\d+)", listed))
    assert len(values) == len(re.split("[;,]", listed))
    if found := re.fullmatch(r"What is (\w) (plus|minus|times) (\w)\?", asked):
        x, word, y = found.groups()
    elif found := re.fullmatch(r"Subtract (\w) from (\w)\.", asked):
        (y, x), word = found.groups(), "minus"
    elif found := re.fullmatch(r"Add (\w) and (\w)\.", asked):
        (x, y), word = found.groups(), "plus"
    else:
        found = re.fullmatch(r"Multiply (\w) by (\w)\.", asked)
        assert found, prompt
        (x, y), word = found.groups(), "times"
    a, b, sign = values[x], values[y], SIGN[word]
    result = worked_out(a, sign, b)
    return f"{x} is {a}, {y} is {b}. {a} {sign} {b} = {result}. Answer: {result}"


def solve_format(prompt: str) -> str:
    found = re.fullmatch(
        r"(?:Write |Here are words: )(.+?)(?:\. Write them)? "
        r"(in this order|in alphabetical order|from last to first), (.+)\.",
        prompt,
    )
    assert found, prompt
    words = found[1].split(", ")
    if found[2] == "in alphabetical order":
        words.sort()
    if found[2] == "from last to first":
        words = words[::-1]
    match found[3]:
        case "joined by commas":
            return ",".join(words)
        case "in upper case, joined by commas":
            return ",".join(word.upper() for word in words)
        case "as a list with dashes":
            return "\n".join("- " + word for word in words)
        case "as a numbered list":
            return "\n".join(f"{k + 1}. {word}" for k, word in enumerate(words))
        case "as a JSON array":
            assert json.loads(json.dumps(words)) == words
            return "[" + ", ".join(f'"{word}"' for word in words) + "]"
    raise AssertionError(prompt)


SOLVERS = {"arithmetic": solve_arithmetic, "table": solve_table, "format": solve_format}
# The longest that each kind can be asked for.
LARGEST = {"arithmetic": "largest=99", "table": "largest=31,entries=20", "format": "words=6"}


def refused(text: str) -> str:
    with pytest.raises(UserError) as caught:
        read_tasks(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["", "largest"])
def test_every_answer_is_right_and_short(kind: str, size: str) -> None:
    written = f"{kind},train=1500,test=500" + (f",{LARGEST[kind]}" if size else "")
    name, train, test = exact_items(written)
    assert (name, len(train), len(test)) == (kind, 1500, 500)
    for item in train + test:
        assert item["completion"] == " " + SOLVERS[kind](item["prompt"])
        # With the token that ends it at most 64 tokens, whatever the tokenizer.
        assert len(item["completion"].encode()) <= 63
    values = [int(n) for item in train + test for n in re.findall(r"\d+", item["completion"])]
    assert kind == "format" or 0 <= min(values) <= max(values) <= 999


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**40), st.sampled_from(sorted(KINDS)))
def test_no_question_stands_twice_in_whatever_wording(seed: int, kind: str) -> None:
    _, train, test = exact_items(f"{kind},train=200,test=100,seed={seed}")

    def meant(item: dict[str, Any]) -> Any:
        if kind == "format":
            return tuple(word for word in re.findall(r"[a-z]+", item["prompt"]) if word in WORDS)
        listed = frozenset(re.findall(r"([a-z])(?:: | = | is )(\d+)", item["prompt"].split(". ")[0]))
        # Both steps with all operands: the same for every wording of a question, and for no other question.
        return listed, item["completion"].split(" Answer")[0]

    everything = [meant(item) for item in train + test]
    assert len(set(everything)) == len(everything)


def test_the_same_text_gives_the_same_items_here_and_elsewhere() -> None:
    state = random.getstate()
    first = exact_items("table,train=50,test=20,seed=3")
    assert first == exact_items("table,seed=3,test=20,train=50")
    assert random.getstate() == state
    assert first[2] == exact_items("table,train=99,test=20,seed=3")[2]
    assert first[1] == exact_items("table,train=99,test=20,seed=3")[1][:50]
    assert first[1] != exact_items("table,train=50,test=20,seed=4")[1]
    # What was measured on these items stays measured on these items.
    digests = {
        kind: hashlib.sha256(json.dumps(exact_items(kind)).encode()).hexdigest()[:12] for kind in KINDS
    }
    assert digests == {"arithmetic": "5c6095797f34", "table": "29c19154b00f", "format": "8272b73a9e4b"}


def test_all_operators_wordings_orders_and_forms_occur() -> None:
    _, train, _ = exact_items("arithmetic")
    prompts = " ".join(item["prompt"] for item in train)
    for part in ("Compute (", "What is (", "Start with", "the sum of", "multiply by", "(", "- ("):
        assert part in prompts
    _, train, _ = exact_items("table")
    prompts = " ".join(item["prompt"] for item in train)
    for part in (": ", " = ", " is ", "Subtract", "Multiply", "Add", "minus", "times", "plus"):
        assert part in prompts
    _, train, _ = exact_items("format")
    assert (
        len({re.sub(r"^(Write|Here).*?(in this|in alpha|from)", "", item["prompt"]) for item in train}) == 15
    )


def test_they_are_a_task_of_a_stream() -> None:
    (task,) = build_stream(DataOptions(source="exact:table,train=30,test=8", test_items=4), seed=0)
    assert (task.name, len(task.train), task.notes) == ("table", 30, [])
    assert task.test is not None
    assert len(task.test) == 4
    assert task_names("exact:format") == ["format"]
    assert read_tasks("exact:format,test=0")[0].test is None
    assert build_stream(DataOptions(source="exact:table", validation=0.1), seed=0)[0].test is not None
    (row,) = build_stream(DataOptions(source="exact:table,train=1,test=0", prompt="chat"), seed=0)[0].train
    (prompt,), (answer,) = row["prompt"], row["completion"]
    assert answer == {"role": "assistant", "content": solve_table(prompt["content"])}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("exact:", "names no kind of questions"),
        (
            "exact:arithmatic",
            "there is no kind 'arithmatic' (did you mean 'arithmetic'?); known: arithmetic, table",
        ),
        ("exact:table,train=many", "option 'train' = 'many': input should be a valid integer"),
        ("exact:table,train=0", "option 'train' = '0'"),
        ("exact:table,seed=-1", "option 'seed' = '-1'"),
        ("exact:table,word=3", "unknown option 'word'"),
        ("exact:table,trian=3", "did you mean 'train'?"),
        ("exact:table,train", "'train' is no setting; write key=value"),
        ("exact:table,train=1,train=2", "'train' stands there twice"),
        ("exact:arithmetic,largest=2,train=500", "756 items are more than there are different questions"),
    ],
)
def test_bad_input_is_told_in_a_sentence(text: str, says: str) -> None:
    message = refused(text)
    assert says in message
    assert "exact:" in message


def test_an_order_names_the_kind() -> None:
    with pytest.raises(UserError, match="it has: table"):
        read_tasks("exact:table", ["tables"])
