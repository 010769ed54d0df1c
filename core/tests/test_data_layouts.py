"""Task folders: every layout is read, and every mistake in one is told in a sentence that says where."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from graftwork.data.layouts import read_tasks, task_names
from graftwork.data.options import DataOptions
from graftwork.data.stream import build_stream
from graftwork.errors import UserError
from graftwork.testing.data import tiny_stream
from hypothesis import given, settings
from hypothesis import strategies as st

DATA = Path(os.environ.get("GRAFTWORK_DATA") or Path(__file__).parents[2].parent / "shared/data")


def write(path: Path, *values: object) -> Path:
    """Write values as JSON lines, or one value as JSON where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def complaint(source: Path | str, order: list[str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_tasks(str(source), order)
    text = str(caught.value)
    assert "\n" not in text
    return text


ITEM = {"sentence": "a film", "label": "Good"}


# ---------------------------------------------------------------------- what is read


def test_benchmark_layout(tmp_path: Path) -> None:
    tiny_stream(tmp_path, train=6, test=3)
    for source in (str(tmp_path), f"cl:olora:{tmp_path}"):
        metal, fruit = read_tasks(source, ["metal", "fruit"])
        assert (metal.name, metal.group, metal.form) == ("metal", "G1", "classification")
        assert metal.labels == ["iron", "gold"]
        assert metal.instruction == "Which metal?\n"
        assert len(fruit.train) == 6
        assert len(fruit.test or []) == 3
    assert task_names(str(tmp_path)) == ["colour", "fruit", "metal"]


def test_only_the_ordered_tasks_are_read(tmp_path: Path) -> None:
    tiny_stream(tmp_path)
    (tmp_path / "G0/fruit/train.json").write_text("broken")
    assert [task.name for task in read_tasks(str(tmp_path), ["metal", "colour"])] == ["metal", "colour"]


def test_instruction_config_of_the_published_code_is_read(tmp_path: Path) -> None:
    tiny_stream(tmp_path)
    (tmp_path / "instructions.json").rename(tmp_path / "instruction_config.json")
    assert read_tasks(str(tmp_path), ["fruit"])[0].instruction == "Which fruit?\n"


def test_trace_layout(tmp_path: Path) -> None:
    write(tmp_path / "sums/train.json", [{"prompt": "1+1=", "answer": "2"}])
    write(tmp_path / "sums/test.json", [{"prompt": "2+2=", "answer": "4"}])
    for source in (str(tmp_path), f"cl:trace:{tmp_path}"):
        (task,) = read_tasks(source)
        assert task.form == "completion"
        assert task.train == [{"prompt": "1+1=", "completion": "2"}]
        assert task.test == [{"prompt": "2+2=", "completion": "4"}]


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("item", "form"),
    [
        (ITEM, "classification"),
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "completion"),
        ({"messages": CHAT}, "chat"),
        ({"text": "a"}, "text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}, "preference"),
        ({"chosen": CHAT, "rejected": CHAT}, "implicit preference"),
        ({"prompt": CHAT[:1]}, "prompt"),
    ],
)
def test_jsonl_forms(tmp_path: Path, item: dict[str, object], form: str) -> None:
    (task,) = read_tasks(str(write(tmp_path / "one.jsonl", item, item)))
    assert (task.name, task.form) == ("one", form)
    assert task.train == [item, item]
    assert len(build_stream(DataOptions(source=str(tmp_path)), seed=0)[0].train) == 2


def test_jsonl_folders(tmp_path: Path) -> None:
    write(tmp_path / "flat.jsonl", {"text": "a"})
    write(tmp_path / "deep/train.jsonl", ITEM)
    write(tmp_path / "deep/test.jsonl", {"sentence": "b", "label": "Bad"})
    write(tmp_path / "deep/labels.json", ["Bad", "Good"])
    deep, flat = read_tasks(str(tmp_path))
    assert (deep.name, deep.labels, len(deep.test or [])) == ("deep", ["Bad", "Good"], 1)
    assert (flat.name, flat.test) == ("flat", None)


def test_a_folder_with_train_and_test_is_one_task(tmp_path: Path) -> None:
    write(tmp_path / "mine/train.jsonl", ITEM)
    write(tmp_path / "mine/test.jsonl", ITEM)
    (task,) = read_tasks(str(tmp_path / "mine"))
    assert task.name == "mine"
    assert len(task.test or []) == 1


def test_line_separators_inside_strings_are_no_line_ends(tmp_path: Path) -> None:
    text = "one\u2028two\x85three"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_tasks(str(path))[0].train == [{"text": text}]


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [item["text"] for item in read_tasks(str(path))[0].train] == ["a", "b"]


def test_columns_for_reward_functions_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "2+2", "label": "4"}, {"prompt": "hi", "hint": "x"})
    (task,) = build_stream(DataOptions(source=str(path)), seed=0)
    assert task.train.to_list() == [
        {"prompt": "2+2", "label": "4", "hint": None},
        {"prompt": "hi", "label": None, "hint": "x"},
    ]


def test_items_without_a_gold_label_are_dropped_with_a_note(tmp_path: Path) -> None:
    tiny_stream(tmp_path, test=2)
    write(
        tmp_path / "G0/fruit/test.json", [{"sentence": "a", "label": "-"}, {"sentence": "b", "label": "pear"}]
    )
    (task,) = read_tasks(str(tmp_path), ["fruit"])
    assert len(task.test or []) == 1
    assert task.notes == ["fruit: 1 items of test.json without a gold label were dropped"]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["{'text': 1}"], ":1: not valid JSON"),
        ([{"text": "a"}, '{"text": "b"'], ":2: not valid JSON"),
        (["[" * 100_000], ":1: not valid JSON"),
        ([{"text": "a"}, "", {"text": "b"}], ":2: an empty line"),
        (["3"], ":1: a int, where a JSON object"),
        (["null"], ":1: a null, where a JSON object"),
        ([[{"text": "a"}]], ":1: a JSON array; a .jsonl file holds one JSON object per line"),
        ([{"txt": "a"}], "did you mean 'text'?"),
        ([{}], "keys none fit no known form"),
        ([{"text": 5}], ":1: 'text' is int, where str is expected"),
        ([{"text": None}], ":1: 'text' is null, where str is expected"),
        ([{"sentence": "a", "label": 1}], ":1: 'label' is int, where str"),
        ([{"text": "a"}, ITEM], ":2: this item is of the form 'classification', those before it 'text'"),
        ([{"prompt": "a"}, {"prompt": CHAT[:1]}], ":2: 'prompt' is list, in the items before it str"),
        ([{"messages": []}], "'messages' is an empty list"),
        ([{"messages": ["hi"]}], "'messages', message 0: expected"),
        ([{"messages": [{"role": "user"}]}], "message 0: 'content' is missing"),
        ([{"messages": [{"from": "human", "value": "hi"}]}], "message 0: expected"),
        (['{"text": "\\ud800"}'], ":1: an escape is half of a surrogate pair"),
        ([ITEM, {"sentence": "a", "label": "good"}], "the labels 'Good' and 'good' are the same"),
        ([{"sentence": "a", "label": "+"}], "the label '+' is empty once punctuation is ignored"),
    ],
)
def test_broken_lines(tmp_path: Path, lines: list[object], says: str) -> None:
    path = write(tmp_path / "bad.jsonl", *lines)
    text = complaint(path)
    assert says in text
    assert str(path) in text


def test_empty_and_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("")
    assert "no items" in complaint(path)
    path.write_text("\n")
    assert "no items" in complaint(path)
    path.write_bytes(b'{"text": "caf\xe9"}')
    assert "is not UTF-8 (byte 13)" in complaint(path)
    path.write_bytes(pickle.dumps({"text": "a"}))
    assert "is not UTF-8" in complaint(path)
    assert "does not exist" in complaint(tmp_path / "absent")
    assert "holds no tasks" in complaint(f"cl:olora:{path}")
    (tmp_path / "empty").mkdir()
    assert "holds no tasks; expected" in complaint(tmp_path / "empty")


def test_sources_that_cannot_be_meant(tmp_path: Path) -> None:
    tiny_stream(tmp_path)
    assert "unknown layout; known: cl:olora, cl:trace" in complaint(f"cl:olra:{tmp_path}")
    assert "names no path" in complaint("")
    assert "names no path" in complaint("jsonl:")
    assert "one group of a benchmark; name the folder above" in complaint(tmp_path / "G0")
    assert "folder of one task" in complaint(tmp_path / "G0/fruit")


def test_orders(tmp_path: Path) -> None:
    tiny_stream(tmp_path)
    assert "'friut', which" in (text := complaint(tmp_path, ["friut"]))
    assert "(did you mean 'fruit'?); it has: colour, fruit, metal" in text
    assert "names the task 'fruit' twice" in complaint(tmp_path, ["fruit", "metal", "fruit"])
    assert "data.order is empty" in complaint(tmp_path, [])
    for name in ("../fruit", "G0/fruit", "/etc/passwd", "..", ""):
        assert "does not have" in complaint(tmp_path, [name])


def test_two_tasks_of_one_name(tmp_path: Path) -> None:
    tiny_stream(tmp_path, names=["fruit"])
    tiny_stream(tmp_path / "again", names=["fruit"])
    (tmp_path / "again/G0").rename(tmp_path / "G9")
    assert "two tasks are named 'fruit'" in complaint(tmp_path)
    write(tmp_path / "lines/a.jsonl", {"text": "a"})
    write(tmp_path / "lines/a/train.jsonl", {"text": "a"})
    assert "two tasks are named 'a'" in complaint(tmp_path / "lines")


@pytest.mark.parametrize(
    ("file", "value", "says"),
    [
        ("train.json", [], "no items"),
        ("train.json", {"sentence": "a"}, "a dict, where a JSON array of items"),
        ("train.json", ["a"], "item 0: a str, where a JSON object"),
        ("train.json", [{"sentence": "a", "label": "pear"}, {"sentence": "b"}], "item 1: the key 'label'"),
        ("train.json", [{"sentence": "a", "labels": "pear"}], "(did you mean 'labels'?)"),
        ("train.json", [{"sentence": ["a"], "label": "pear"}], "item 0: 'sentence' is list, where str"),
        (
            "test.json",
            [{"sentence": "a", "label": "paer"}],
            "item 0: the label 'paer' is not one of the task's",
        ),
        ("test.json", [{"sentence": "a", "label": "paer"}], "(did you mean 'pear'?): apple, pear"),
        ("labels.json", [], "no labels"),
        ("labels.json", ["a", "a"], "item 1: the label 'a' stands there twice"),
        ("labels.json", ["a", 1], "item 1: a label is a non-empty string"),
        ("labels.json", {"a": 1}, "a dict, where a JSON array"),
        ("labels.json", ["yes", "Yes!"], "the labels 'yes' and 'Yes!' are the same"),
    ],
)
def test_broken_benchmark_files(tmp_path: Path, file: str, value: object, says: str) -> None:
    tiny_stream(tmp_path)
    path = write(tmp_path / "G0/fruit" / file, value)
    text = complaint(tmp_path, ["fruit"])
    assert says in text
    assert str(path) in text


def test_missing_benchmark_files(tmp_path: Path) -> None:
    tiny_stream(tmp_path)
    (tmp_path / "G0/fruit/labels.json").unlink()
    assert "fruit/labels.json' does not exist" in complaint(tmp_path, ["fruit"])
    for value in ('{"G1": "Which?"}', '["a"]', '{"G1": [{"instruction": 3}]}', '{"G1": []}'):
        (tmp_path / "instructions.json").write_text(value)
        assert "instructions.json: expected" in complaint(tmp_path, ["metal"])


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=80)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["text", "prompt", "completion", "messages", "role", "content", "sentence", "label", "x"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_line_is_read_or_refused_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, line: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_bytes(line)
    try:
        tasks = build_stream(DataOptions(source=str(path)), seed=0)
    except UserError as error:
        assert str(path) in str(error) or "task 'a'" in str(error)  # noqa: PT017
    else:
        assert len(tasks[0].train) >= 1


# ---------------------------------------------------------------------- real data


@pytest.mark.skipif(not (DATA / "continual").is_dir(), reason=f"no real data at {DATA}; set GRAFTWORK_DATA")
def test_real_benchmark() -> None:
    tasks = read_tasks(f"cl:olora:{DATA / 'continual'}")
    assert len(tasks) == 14
    for task in tasks:
        assert task.test
        assert {item["label"] for item in task.train} <= set(task.labels)
        assert bool(task.instruction) == (task.name != "COPA")
    order = ["dbpedia", "amazon", "agnews", "SST-2"]
    options = DataOptions(
        source=str(DATA / "continual"), order=order, train_items=200, test_items=150, max_words=48
    )
    stream = build_stream(options, seed=0)
    assert [task.name for task in stream] == order
    assert all(len(task.train) == 200 and len(task.test or []) == 150 for task in stream)
    assert all(row["prompt"].endswith("\nAnswer:") for task in stream for row in task.train.to_list())


# ---------------------------------------------------------------------- Alpaca's layout

ASKED = {"instruction": "Make it polite.", "input": "Give me that!", "output": "Could I have that?"}


def test_alpaca_layout(tmp_path: Path) -> None:
    bare = {"instruction": " Name a fruit.\n", "output": "A pear.\n"}
    file = write(tmp_path / "asked.json", [ASKED, {**bare, "input": ""}, bare])
    for source in (str(file), f"alpaca:{file}"):
        (task,) = read_tasks(source)
        assert (task.name, task.form, task.test, task.notes) == ("asked", "completion", None, [])
        pear = {"prompt": "Name a fruit.", "completion": "\n\nA pear."}
        polite = {"prompt": "Make it polite.\n\nGive me that!", "completion": "\n\nCould I have that?"}
        assert task.train == [polite, pear, pear]
    assert task_names(str(file)) == ["asked"]
    (row, *_) = build_stream(DataOptions(source=str(file), prompt="chat"), seed=0)[0].train
    assert row["prompt"] == [{"role": "user", "content": "Make it polite.\n\nGive me that!"}]
    assert row["completion"] == [{"role": "assistant", "content": "Could I have that?"}]


def test_alpaca_items_are_cut_in_two_parts_for_tuning(tmp_path: Path) -> None:
    items = [{"instruction": f"Say {number}.", "input": "", "output": str(number)} for number in range(40)]
    file = write(tmp_path / "asked.json", items)
    options = DataOptions(source=str(file), validation=0.5, test_items=7)
    (task,) = build_stream(options, seed=1)
    assert task.test is not None
    assert (len(task.train), len(task.test)) == (20, 7)
    assert not set(task.train["prompt"]) & set(task.test["prompt"])


def test_alpaca_prompts_without_answers_are_dropped_with_a_note(tmp_path: Path) -> None:
    file = write(tmp_path / "asked.json", [{**ASKED, "output": " "}, ASKED, {**ASKED, "output": ""}])
    (task,) = read_tasks(str(file))
    assert len(task.train) == 1
    assert task.notes == ["asked: 2 items without an answer were dropped"]
    assert "no item has an answer" in complaint(write(file, [{**ASKED, "output": ""}]))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "no items"),
        ([3], "item 0: a int, where a JSON object is expected"),
        ([ASKED, {"instruction": "a"}], "item 1: the key 'output' is missing"),
        ([{**ASKED, "output": None}], "item 0: 'output' is null, where str is expected"),
        ([{**ASKED, "input": 3}], "item 0: 'input' is int, where str is expected"),
        ([{**ASKED, "instruction": " ", "input": ""}], "item 0: neither 'instruction' nor 'input'"),
        ([{**ASKED, "history": [["a", "b"]]}], "item 0: 'history' is not read"),
        ([{"instruction": "a", "outputs": "b"}], "the key 'output' is missing (did you mean 'outputs'?)"),
        ("[{", "not valid JSON"),
    ],
)
def test_broken_alpaca_files(tmp_path: Path, value: object, says: str) -> None:
    file = write(tmp_path / "asked.json", value)
    message = complaint(file)
    assert says in message
    assert str(file) in message
    assert says in complaint(f"alpaca:{file}")


def test_alpaca_files_that_cannot_be_meant(tmp_path: Path) -> None:
    assert "does not exist" in complaint(f"alpaca:{tmp_path / 'none.json'}")
    assert "cannot be read" in complaint(f"alpaca:{tmp_path}")
    # JSON lines under the name .json are no array and stay what they were.
    assert read_tasks(str(write(tmp_path / "lines.json", {"text": "a"})))[0].form == "text"


@pytest.mark.skipif(not (DATA / "sft").exists(), reason="needs the real instructions beside the checkout")
def test_real_instructions() -> None:
    (task,) = read_tasks(str(DATA / "sft/alpaca_en_demo.json"))
    assert (len(task.train), task.notes) == (999, [])
    assert sum("\n\n" in item["prompt"] for item in task.train) >= 412
