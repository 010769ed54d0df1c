"""From items to a stream: drawing, rendering, cutting, validation splits, overlaps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from graftwork.data.layouts import RawTask
from graftwork.data.options import DataOptions
from graftwork.data.prompts import classification_prompt, cut_words, leaks, render, without_middle
from graftwork.data.stream import build_stream, held_out_tasks
from graftwork.errors import UserError
from graftwork.testing.data import tiny_stream
from graftwork.testing.models import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError


def options(source: Path | str = "none", **changes: Any) -> DataOptions:
    return DataOptions(source=str(source), **changes)


TASK = RawTask("news", "classification", [], labels=["World", "Sports"], group="TC", instruction="Topic?\n")


# ---------------------------------------------------------------------- prompts


def test_prompt_styles() -> None:
    plain = classification_prompt(TASK, "A {match} was won. ", options())
    assert plain == "Topic?\nOption: World, Sports \nA {match} was won.\nAnswer:"
    published = classification_prompt(TASK, "A match.", options(prompt="published"))
    assert published == "Task:TC\nDataset:news\nTopic?\nOption: World, Sports \nA match.\nAnswer:"
    bare = classification_prompt(TASK, "A match.", options(options_in_prompt=False))
    assert bare == "Topic?\nA match.\nAnswer:"


def test_published_prompt_without_instruction_lists_no_options() -> None:
    copa = RawTask("copa", "classification", [], labels=["A", "B"], group="COPA")
    prompt = classification_prompt(copa, "Which?", options(prompt="published"))
    assert prompt == "Task:COPA\nDataset:copa\nWhich?\nAnswer:"


def test_rows() -> None:
    item = {"sentence": "A match.", "label": "Sports"}
    (row,) = render(TASK, [item], options())
    assert row["completion"] == " Sports"
    assert row["label"] == "Sports"
    (row,) = render(TASK, [item], options(prompt="chat"))
    assert row["prompt"] == [{"role": "user", "content": classification_prompt(TASK, "A match.", options())}]
    assert row["completion"] == [{"role": "assistant", "content": "Sports"}]


COMPLETION = RawTask("asked", "completion", [])


def test_completion_items_as_chat() -> None:
    item = {"prompt": "Where is Rome?\n", "completion": " In Italy.", "tools": None}
    assert render(COMPLETION, [item], options()) == [item]
    (row,) = render(COMPLETION, [item], options(prompt="chat"))
    assert row == {
        "prompt": [{"role": "user", "content": "Where is Rome?"}],
        "completion": [{"role": "assistant", "content": "In Italy."}],
        "tools": None,
    }


@pytest.mark.parametrize(
    ("completion", "content"),
    [
        ("\n\nYes.\n", "Yes.\n"),
        ("Yes.", "Yes."),
        ("    return 1", "    return 1"),
        ("\n    return 1", "    return 1"),
        (" ", " "),
    ],
)
def test_only_what_parts_prompt_and_answer_goes(completion: str, content: str) -> None:
    (row,) = render(COMPLETION, [{"prompt": "a", "completion": completion}], options(prompt="chat"))
    assert row["completion"][0]["content"] == content


def test_chats_stay_chats() -> None:
    said = [{"role": "user", "content": "Hi"}]
    for item in ({"prompt": said, "completion": said}, {"prompt": said, "completion": " Hello"}):
        assert render(COMPLETION, [item], options(prompt="chat")) == [item]
    assert render(RawTask("one", "text", []), [{"text": "a"}], options(prompt="chat")) == [{"text": "a"}]


@given(st.text(alphabet="ab \n\u3000\U0001f600", max_size=200), st.integers(20, 120))
def test_a_chat_prompt_loses_its_middle_to_the_limit(prompt: str, limit: int) -> None:
    tokenizer = tiny_tokenizer()
    chosen = options(prompt="chat", max_prompt_tokens=limit)
    (row,) = render(COMPLETION, [{"prompt": prompt, "completion": " b"}], chosen, tokenizer)
    (message,) = row["prompt"]
    ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    whole = [{"role": "user", "content": prompt.rstrip()}]
    if len(tokenizer.apply_chat_template(whole, add_generation_prompt=True)["input_ids"]) <= limit:
        assert row["prompt"] == whole
    else:
        half = len(message["content"]) // 2
        assert prompt.startswith(message["content"][: len(message["content"]) - half])
        assert prompt.rstrip().endswith(message["content"][len(message["content"]) - half :])
    # A single character of several tokens is the least that can stay.
    assert len(ids) <= limit or len(message["content"]) == 1


def test_a_limit_below_the_chat_template_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(
        UserError, match=r"max_prompt_tokens is 5, but a chat has \d+ tokens before any prompt"
    ):
        render(
            COMPLETION,
            [{"prompt": "a", "completion": "b"}],
            options(prompt="chat", max_prompt_tokens=5),
            tokenizer,
        )


def test_leaks_are_told() -> None:
    assert leaks(options(options_in_prompt=False)) == []
    assert leaks(options()) == ["label options in the prompt"]
    assert leaks(options(prompt="published")) == [
        "task and data set name in the prompt",
        "label options in the prompt",
    ]


@given(st.text(alphabet="ab \n\t\u3000", max_size=40), st.integers(1, 6))
def test_cut_words_keeps_the_first_words_and_their_breaks(text: str, count: int) -> None:
    cut = cut_words(text, count)
    assert text.startswith(cut)
    assert cut.split() == text.split()[:count]


@given(st.text(min_size=0, max_size=300), st.integers(48, 120), st.sampled_from(["plain", "chat"]))
def test_token_cut_fits_and_keeps_the_tail(sentence: str, limit: int, style: Any) -> None:
    tokenizer = tiny_tokenizer()
    chosen = options(prompt=style, options_in_prompt=False, max_prompt_tokens=limit)
    (row,) = render(TASK, [{"sentence": sentence, "label": "World"}], chosen, tokenizer)
    if style == "chat":
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        text = row["prompt"][0]["content"]
    else:
        ids, text = tokenizer(row["prompt"])["input_ids"], row["prompt"]
    assert len(ids) <= limit
    assert text.startswith("Topic?\n")
    assert text.endswith("\nAnswer:")


def test_token_cut_prefers_whole_words_and_refuses_the_impossible() -> None:
    tokenizer = tiny_tokenizer()
    item = {"sentence": "alpha beta gamma delta", "label": "World"}
    bare = len(tokenizer(classification_prompt(TASK, "", options()))["input_ids"])
    (row,) = render(TASK, [item], options(max_prompt_tokens=bare + 13), tokenizer)
    assert "alpha beta\nAnswer:" in row["prompt"]
    (row,) = render(TASK, [item], options(max_prompt_tokens=bare + 10), tokenizer)
    assert "alpha beta\nAnswer:" in row["prompt"]
    with pytest.raises(UserError, match=r"a prompt of task 'news' has \d+ tokens before any sentence"):
        render(TASK, [item], options(max_prompt_tokens=bare - 1), tokenizer)


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "wrong",
    [
        {"train_items": 0},
        {"max_words": -1},
        {"validation": 0},
        {"validation": 1.0},
        {"prompt": "fancy"},
        {"sourc": "x"},
        {"max_prompt_tokens": 0},
        {"draw_seed": -1},
    ],
)
def test_options_have_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataOptions(**{"source": "x", **wrong})


def test_every_option_has_a_description() -> None:
    assert all(field.description for field in DataOptions.model_fields.values())


# ---------------------------------------------------------------------- streams


def test_stream_is_numbered_in_order(tmp_path: Path) -> None:
    stream = build_stream(options(tiny_stream(tmp_path), order=["metal", "fruit"]), seed=1)
    assert [(task.name, task.index, task.total) for task in stream] == [("metal", 0, 2), ("fruit", 1, 2)]
    assert stream[0].train.column_names == ["prompt", "completion"]
    assert stream[0].test is not None
    assert stream[0].test.column_names == ["prompt", "completion", "label"]
    assert stream[0].labels == ["iron", "gold"]
    assert stream[0].notes == []


def test_drawing_is_seeded_and_does_not_depend_on_the_order(tmp_path: Path) -> None:
    tiny_stream(tmp_path)

    def drawn(seed: int, **changes: Any) -> list[str]:
        chosen = {"order": ["fruit"], "train_items": 8, "test_items": 4, **changes}
        task = next(t for t in build_stream(options(tmp_path, **chosen), seed=seed) if t.name == "fruit")
        assert task.test is not None
        return [*task.train["prompt"], *task.test["prompt"]]

    assert len(drawn(1)) == 12
    assert drawn(1) == drawn(1) == drawn(1, order=["metal", "fruit"])
    assert drawn(1) != drawn(2)
    assert drawn(1, draw_seed=5) == drawn(2, draw_seed=5) == drawn(5)


def test_validation_replaces_the_test_file(tmp_path: Path) -> None:
    tiny_stream(tmp_path, names=["fruit"], train=64)
    (whole,) = build_stream(options(tmp_path), seed=3)
    (cut,) = build_stream(options(tmp_path, validation=0.1), seed=3)
    assert cut.test is not None
    assert len(cut.test) == 16
    assert len(cut.train) == 48
    assert sorted([*cut.train["prompt"], *cut.test["prompt"]]) == sorted(whole.train["prompt"])
    (fewer,) = build_stream(options(tmp_path, validation=0.1, train_items=5), seed=3)
    assert fewer.test is not None
    assert list(fewer.test["prompt"]) == list(cut.test["prompt"])
    assert len(fewer.train) == 5
    (half,) = build_stream(options(tmp_path, validation=0.5), seed=3)
    assert half.test is not None
    assert len(half.test) == 32
    assert "not trained on" in cut.notes[0]


def test_validation_needs_enough_items_with_answers(tmp_path: Path) -> None:
    tiny_stream(tmp_path / "few", names=["fruit"], train=16)
    with pytest.raises(UserError, match="has 16 training items, too few to cut off 16"):
        build_stream(options(tmp_path / "few", validation=0.1), seed=0)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}))
    with pytest.raises(UserError, match="no answer to score"):
        build_stream(options(tmp_path / "a.jsonl", validation=0.1), seed=0)


def test_overlap_is_noted_or_refused(tmp_path: Path) -> None:
    tiny_stream(tmp_path, names=["fruit"])
    folder = tmp_path / "G0/fruit"
    items = json.loads((folder / "train.json").read_text())
    test = json.loads((folder / "test.json").read_text())
    (folder / "test.json").write_text(json.dumps(test + items[:2]))
    (task,) = build_stream(options(tmp_path), seed=0)
    assert "2 test items also stand in the training items" in task.notes[0]
    assert items[0]["sentence"] in task.notes[0]
    with pytest.raises(UserError, match="2 test items also stand in the training items"):
        build_stream(options(tmp_path, overlap="refuse"), seed=0)


def _folder(tmp_path: Path, train: Any, test: Any) -> Path:
    (tmp_path / "t").mkdir()
    (tmp_path / "t/train.jsonl").write_text(json.dumps(train))
    (tmp_path / "t/test.jsonl").write_text(json.dumps(test))
    return tmp_path


def test_chat_items_are_scored_on_their_last_answer(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (task,) = build_stream(options(_folder(tmp_path, {"messages": chat}, {"messages": chat})), seed=0)
    assert task.test is not None
    assert task.test.to_list() == [{"prompt": chat[:1], "completion": chat[1:]}]
    assert task.train.column_names == ["messages"]
    assert "1 test items also stand" in task.notes[0]


def test_test_items_without_answers_are_left_out_with_a_note(tmp_path: Path) -> None:
    (task,) = build_stream(options(_folder(tmp_path, {"text": "a"}, {"text": "b"}), max_words=3), seed=0)
    assert task.test is None
    assert "are not scored" in task.notes[0]
    assert "sentences of labelled items only" in task.notes[1]


def test_held_out_tasks_are_not_in_the_stream(tmp_path: Path) -> None:
    tiny_stream(tmp_path)
    chosen = options(tmp_path, order=["fruit"])
    assert [task.name for task in held_out_tasks(chosen, ["metal"], seed=0)] == ["metal"]
    with pytest.raises(UserError, match="which the stream trains on"):
        held_out_tasks(chosen, ["fruit"], seed=0)
    with pytest.raises(UserError, match="which the stream trains on"):
        held_out_tasks(options(tmp_path), ["fruit"], seed=0)
    (tmp_path / "G1/metal/test.json").unlink()
    with pytest.raises(UserError, match="has no test items"):
        held_out_tasks(chosen, ["metal"], seed=0)


@settings(deadline=None, max_examples=50)
@given(st.text(min_size=1, max_size=80), st.integers(1, 40))
def test_a_long_prompt_without_a_sentence_loses_its_middle(prompt: str, limit: int) -> None:
    tokenizer = tiny_tokenizer()
    cut = without_middle(prompt, limit, tokenizer)
    tokens = len(tokenizer(cut)["input_ids"])
    if len(tokenizer(prompt)["input_ids"]) <= limit:
        assert cut == prompt
    else:
        # One character can be four byte tokens; the last one is never taken away.
        assert tokens <= limit or len(cut) == 1
        head = len(cut) - len(cut) // 2
        assert prompt.startswith(cut[:head])
        assert prompt.endswith(cut[head:])
        wider = prompt[: head + 1] + prompt[len(prompt) - len(cut) // 2 - 1 :]
        assert len(tokenizer(wider)["input_ids"]) > limit
