"""Read tasks from disk: the CL-benchmark layout, the TRACE layout, Alpaca's, and plain JSONL.

Every mistake in a file is told in one sentence with the file and the line or item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.data.exact_answers import exact_items
from graftwork.data.json_lines import objects, parse_json, read_text, type_word
from graftwork.data.labels import label_problem
from graftwork.errors import UserError, did_you_mean
from graftwork.files import made_once

# What an item of each form must have; the first form whose keys are all there is the one meant.
FORMS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "classification": {"sentence": str, "label": str},
    "preference": {"prompt": (str, list), "chosen": (str, list), "rejected": (str, list)},
    "completion": {"prompt": (str, list), "completion": (str, list)},
    "implicit preference": {"chosen": list, "rejected": list},
    "chat": {"messages": list},
    "text": {"text": str},
    "prompt": {"prompt": (str, list)},
}
# What may stand beside the keys of a form and is handed on to the trainer.
EXTRAS = ("tools", "chat_template_kwargs")
Readers = dict[str, Callable[[], "RawTask"]]
Layout = Callable[[Path], Readers]

TINY = "tiny"

# MNLI's test file marks items without a gold label so; a normalised "-" would equal an empty answer.
NO_GOLD = "-"


@dataclass
class RawTask:
    """A task as it lies on disk: items of one form (a key of ``FORMS``), not yet rendered.

    ``notes`` says in words what was dropped on reading.
    """

    name: str
    form: str
    train: list[dict[str, Any]]
    test: list[dict[str, Any]] | None = None
    labels: list[str] = field(default_factory=list)
    group: str = ""
    instruction: str = ""
    notes: list[str] = field(default_factory=list)


def read_tasks(
    source: str, order: Sequence[str] | None = None, sources: Mapping[str, Layout] | None = None
) -> list[RawTask]:
    """Return the tasks of ``source``, in ``order`` where given, else sorted by name.

    ``source`` is ``cl:olora:<folder>``, ``cl:trace:<folder>``, ``alpaca:<file>``, ``jsonl:<path>`` or a bare
    path, whose layout is then found out; or ``tiny``, three generated tasks that a tiny model can learn; or
    ``exact:<kind>``, see :mod:`graftwork.data.exact_answers`. ``sources`` are further layouts by name, from
    plugins. Only the files of the tasks in ``order`` are read.

    Raises:
        UserError: a missing path, an unknown layout or task, or a mistake in a file.
    """
    layouts = {**LAYOUTS, **(sources or {})}
    layout, path = _split(source, layouts)
    # A layout of a plugin may make its data, and says itself when it needs a file.
    if layout in LAYOUTS and layout not in GENERATED and not path.exists():
        raise UserError(f"data '{path}' does not exist; name a task folder or a JSONL file")
    readers = layouts[layout](path)
    if not readers:
        raise UserError(
            f"data '{path}' holds no tasks; expected <group>/<task>/{{train,labels}}.json, "
            f"<task>/{{train,test}}.json, <task>/train.jsonl or <task>.jsonl"
        )
    if order is not None and not order:
        raise UserError("data.order is empty; name at least one task, or leave it out to learn all of them")
    names = list(order) if order is not None else sorted(readers)
    for index, name in enumerate(names):
        if name not in readers:
            raise UserError(
                f"data.order names the task '{name}', which '{path}' does not have"
                f"{did_you_mean(name, readers)}; it has: {', '.join(sorted(readers))}"
            )
        if name in names[:index]:
            raise UserError(f"data.order names the task '{name}' twice; a stream learns every task once")
    return [readers[name]() for name in names]


def task_names(source: str) -> list[str]:
    """Return the names of the tasks of ``source`` without reading their items."""
    layout, path = _split(source, LAYOUTS)
    return sorted(LAYOUTS[layout](path)) if layout in GENERATED or path.exists() else []


def _split(source: str, layouts: Mapping[str, Layout]) -> tuple[str, Path]:
    """Return the layout that ``source`` names, or the one that its files show, and the path."""
    if source == TINY:
        return "cl:olora", _tiny()
    for layout in layouts:
        if source.startswith(f"{layout}:"):
            return layout, _path(source.removeprefix(f"{layout}:"), source)
    if source.startswith("cl:"):
        known = ", ".join(layout for layout in LAYOUTS if layout.startswith("cl:"))
        raise UserError(f"data '{source}': unknown layout; known: {known}")
    path = _path(source, source)
    # No JSONL file begins so: a line of it is an object.
    if path.suffix == ".json" and path.is_file() and read_text(path).lstrip().startswith("["):
        return "alpaca", path
    if path.is_dir() and any(path.glob("*/*/train.json")):
        return "cl:olora", path
    if path.is_dir() and any(path.glob("*/train.json")):
        if any(path.glob("*/labels.json")):
            raise UserError(f"data '{path}' is one group of a benchmark; name the folder above it")
        return "cl:trace", path
    if path.is_dir() and (path / "train.json").exists():
        raise UserError(f"data '{path}' is the folder of one task; name the folder that holds the tasks")
    return "jsonl", path


def _tiny() -> Path:
    """Return the folder of the generated tasks, made the first time."""
    from graftwork.testing.data import tiny_stream

    return made_once("tiny-tasks-1", tiny_stream)


def _path(text: str, source: str) -> Path:
    if not text.strip():
        if source.rstrip(": ") in GENERATED:
            raise UserError(f"data '{source}' names no kind of questions; write for example exact:arithmetic")
        raise UserError(f"data '{source}' names no path; name a task folder or a JSONL file")
    return Path(text)


# ---------------------------------------------------------------------- layouts


def _olora(folder: Path) -> Readers:
    """``<group>/<task>/{train,test,labels}.json``, and one ``instructions.json`` for the groups."""
    instructions = _instructions(folder)

    def reader(path: Path) -> Callable[[], RawTask]:
        group = path.parent.name

        def read() -> RawTask:
            labels = _labels(path / "labels.json")
            task = RawTask(path.name, "classification", [], labels=labels, group=group)
            task.instruction = instructions.get(group, "")
            task.train = _labelled(path / "train.json", task)
            if (path / "test.json").exists():
                task.test = _labelled(path / "test.json", task)
            return task

        return read

    return _named((file.parent, reader(file.parent)) for file in sorted(folder.glob("*/*/train.json")))


def _trace(folder: Path) -> Readers:
    """``<task>/{train,test}.json``: arrays of ``{"prompt", "answer"}``."""

    def reader(path: Path) -> Callable[[], RawTask]:
        def items(file: Path) -> list[dict[str, Any]]:
            found = []
            for where, item in _array(file):
                _need(item, {"prompt": str, "answer": str}, where)
                found.append({"prompt": item["prompt"], "completion": item["answer"]})
            return _not_empty(found, file)

        def read() -> RawTask:
            test = items(path / "test.json") if (path / "test.json").exists() else None
            return RawTask(path.name, "completion", items(path / "train.json"), test)

        return read

    return _named((file.parent, reader(file.parent)) for file in sorted(folder.glob("*/train.json")))


def _jsonl(path: Path) -> Readers:
    """A ``.jsonl`` file; or a folder of ``<task>.jsonl``, of ``<task>/train.jsonl``, or one task's folder."""

    def one(file: Path) -> Callable[[], RawTask]:
        return lambda: _jsonl_task(file.stem, file, None, None)

    def parts(folder: Path) -> Callable[[], RawTask]:
        return lambda: _jsonl_task(
            folder.name, folder / "train.jsonl", folder / "test.jsonl", folder / "labels.json"
        )

    if path.is_file():
        return {path.stem: one(path)}
    if (path / "train.jsonl").exists():
        # Were train.jsonl and test.jsonl two tasks, the test items would be trained on.
        return {path.resolve().name: parts(path)}
    return _named(
        [(file.with_suffix(""), one(file)) for file in sorted(path.glob("*.jsonl"))]
        + [(file.parent, parts(file.parent)) for file in sorted(path.glob("*/train.jsonl"))]
    )


def _alpaca(path: Path) -> Readers:
    """One JSON array of ``{"instruction", "input", "output"}``: text that is asked, and its answer."""

    def read() -> RawTask:
        task = RawTask(path.stem, "completion", [])
        empty = 0
        for where, item in _array(path):
            _need(item, {"instruction": str, "output": str}, where)
            asked = [item["instruction"], item.get("input", "")]
            if not isinstance(asked[1], str):
                raise UserError(f"{where}: 'input' is {type_word(asked[1])}, where str is expected")
            for key in ("system", "history"):
                if item.get(key):
                    raise UserError(
                        f"{where}: '{key}' is not read, and the answer depends on it; write the item as messages in "
                        f"a .jsonl file"
                    )
            prompt = "\n\n".join(text.strip() for text in asked if text.strip())
            if not prompt:
                raise UserError(f"{where}: neither 'instruction' nor 'input' says anything")
            if item["output"].strip():
                task.train.append({"prompt": prompt, "completion": f"\n\n{item['output'].strip()}"})
            else:
                empty += 1
        if empty and not task.train:
            raise UserError(f"{path}: no item has an answer ('output'); at least one is needed")
        if empty:
            task.notes.append(f"{path.stem}: {empty} items without an answer were dropped")
        _not_empty(task.train, path)
        return task

    return {path.stem: read}


def _exact(path: Path) -> Readers:
    """No file: ``<kind>[,<setting>=<value>...]`` of generated questions."""
    name, train, test = exact_items(str(path))
    return {name: lambda: RawTask(name, "completion", train, test or None)}


def _named(readers: Iterable[tuple[Path, Callable[[], RawTask]]]) -> Readers:
    """Return the readers by task name, the last part of the path."""
    found: dict[str, tuple[Path, Callable[[], RawTask]]] = {}
    for path, read in readers:
        if path.name in found:
            raise UserError(
                f"two tasks are named '{path.name}': {found[path.name][0]} and {path}; rename one"
            )
        found[path.name] = (path, read)
    return {name: read for name, (_, read) in found.items()}


LAYOUTS: dict[str, Layout] = {
    "cl:olora": _olora,
    "cl:trace": _trace,
    "alpaca": _alpaca,
    "exact": _exact,
    "jsonl": _jsonl,
}
# These are made and not read.
GENERATED = ("exact",)


def _jsonl_task(name: str, train: Path, test: Path | None, labels: Path | None) -> RawTask:
    items, form = _lines(train)
    task = RawTask(name, form, items)
    if test is not None and test.exists():
        task.test, test_form = _lines(test)
        if test_form != form:
            raise UserError(f"{test}: its items are of the form '{test_form}', those of {train} '{form}'")
    if form == "classification":
        if labels is not None and labels.exists():
            task.labels = _labels(labels)
        else:
            task.labels = sorted({item["label"] for item in items})
            problem = label_problem(task.labels)
            if problem:
                raise UserError(f"{train}: {problem}")
        for file, part in ((train, items), (test, task.test or [])):
            for index, item in enumerate(part):
                _check_label(item["label"], task.labels, f"{file}:{index + 1}")
    return task


# ---------------------------------------------------------------------- files and items


def _lines(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Return the items of a JSONL file, all of one form, and the form."""
    items: list[dict[str, Any]] = []
    form, kinds = "", {}
    for where, item in objects(read_text(path), str(path)):
        this = _form(item, where)
        form = form or this
        if this != form:
            raise UserError(
                f"{where}: this item is of the form '{this}', those before it '{form}'; use one form a file"
            )
        for key in FORMS[form]:
            kind = kinds.setdefault(key, type(item[key]))
            if type(item[key]) is not kind:
                raise UserError(
                    f"{where}: '{key}' is {type_word(item[key])}, in the items before it {kind.__name__}; "
                    f"use text or chat messages, not both"
                )
        items.append(item)
    return _columns(_not_empty(items, path), form), form


def _form(item: dict[str, Any], where: str) -> str:
    for form, keys in FORMS.items():
        if all(key in item for key in keys):
            _need(item, keys, where)
            for key in keys:
                if isinstance(item[key], list):
                    _messages(item[key], f"{where}: '{key}'")
            return form
    words = {key for keys in FORMS.values() for key in keys}
    hint = next((f"; '{key}'{did_you_mean(key, words)}" for key in item if did_you_mean(key, words)), "")
    forms = "; ".join("+".join(keys) for keys in FORMS.values())
    raise UserError(f"{where}: keys {', '.join(item) or 'none'} fit no known form ({forms}){hint}")


def _messages(messages: list[Any], where: str) -> None:
    """Check a conversation as TRL takes it: messages with a role and content (or tool calls)."""
    if not messages:
        raise UserError(f"{where} is an empty list; a conversation has at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f'{where}, message {index}: expected {{"role": "...", "content": "..."}}')
        if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
            raise UserError(f"{where}, message {index}: 'content' is missing or no text")


def _columns(items: list[dict[str, Any]], form: str) -> list[dict[str, Any]]:
    """Return the items with the same keys everywhere: those of the form and what a trainer reads beside."""
    others = dict.fromkeys(key for item in items for key in item if key not in FORMS[form])
    # Prompts alone are for reinforcement learning, whose reward functions are given every other column.
    kept = [key for key in others if form == "prompt" or key in EXTRAS]
    return [
        {**{key: item[key] for key in FORMS[form]}, **{key: item.get(key) for key in kept}} for item in items
    ]


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, list):
        raise UserError(f"{path}: a {type_word(value)}, where a JSON array of items is expected")
    for index, item in enumerate(value):
        yield f"{path}, item {index}", item


def _labelled(path: Path, task: RawTask) -> list[dict[str, Any]]:
    items, dropped = [], 0
    for where, item in _array(path):
        _need(item, {"sentence": str, "label": str}, where)
        if item["label"] == NO_GOLD and NO_GOLD not in task.labels:
            dropped += 1
            continue
        _check_label(item["label"], task.labels, where)
        items.append({"sentence": item["sentence"], "label": item["label"]})
    if dropped:
        task.notes.append(
            f"{path.parent.name}: {dropped} items of {path.name} without a gold label were dropped"
        )
    return _not_empty(items, path)


def _labels(path: Path) -> list[str]:
    labels = [item for _, item in _array(path)]
    for index, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise UserError(f"{path}, item {index}: a label is a non-empty string")
        if label in labels[:index]:
            raise UserError(f"{path}, item {index}: the label '{label}' stands there twice")
    if not labels:
        raise UserError(f"{path}: no labels; a classification task has at least one")
    problem = label_problem(labels)
    if problem:
        raise UserError(f"{path}: {problem}")
    return labels


def _instructions(folder: Path) -> dict[str, str]:
    for name in ("instructions.json", "instruction_config.json"):
        path = folder / name
        if not path.exists():
            continue
        value = parse_json(read_text(path), str(path))
        try:
            # Joined to text here, so that anything but a string is found out now.
            return {group: "" + entries[0]["instruction"] for group, entries in value.items()}
        except (AttributeError, LookupError, TypeError):
            raise UserError(
                f'{path}: expected {{"<group>": [{{"instruction": "..."}}]}}, as in the CL benchmark'
            ) from None
    return {}


def _need(item: Any, keys: dict[str, Any], where: str) -> None:
    if not isinstance(item, dict):
        raise UserError(f"{where}: a {type_word(item)}, where a JSON object is expected")
    for key, kind in keys.items():
        if key not in item:
            raise UserError(f"{where}: the key '{key}' is missing{did_you_mean(key, item)}")
        if not isinstance(item[key], kind):
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise UserError(f"{where}: '{key}' is {type_word(item[key])}, where {wanted} is expected")


def _check_label(label: str, labels: list[str], where: str) -> None:
    if label not in labels:
        raise UserError(
            f"{where}: the label '{label}' is not one of the task's labels{did_you_mean(label, labels)}: "
            f"{', '.join(labels)}"
        )


def _not_empty(items: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    if not items:
        raise UserError(f"{path}: no items; a task needs at least one")
    return items
