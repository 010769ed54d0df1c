"""Read tasks from disk: the CL-benchmark layout, the TRACE layout, and plain JSONL.

Every mistake in a file is told in one sentence with the file and the line or item.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.errors import UserError, did_you_mean

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
# MNLI's test file marks items without a gold label so; a normalised "-" would equal an empty answer.
NO_GOLD = "-"


@dataclass
class RawTask:
    """A task as it lies on disk: items of one form, not yet rendered."""

    name: str
    form: str
    train: list[dict[str, Any]]
    test: list[dict[str, Any]] | None = None
    labels: list[str] = field(default_factory=list)
    group: str = ""
    instruction: str = ""
    notes: list[str] = field(default_factory=list)


def read_tasks(source: str, order: Sequence[str] | None = None) -> list[RawTask]:
    """Return the tasks of ``source``, in ``order`` where given, else sorted by name.

    ``source`` is ``cl:olora:<folder>``, ``cl:trace:<folder>``, ``jsonl:<path>`` or a bare path, whose
    layout is then found out. Only the files of the tasks in ``order`` are read.

    Raises:
        UserError: a missing path, an unknown layout or task, or a mistake in a file.
    """
    layout, path = _split(source)
    if not path.exists():
        raise UserError(f"data '{path}' does not exist; name a task folder or a JSONL file")
    readers = LAYOUTS[layout](path)
    if not readers:
        raise UserError(
            f"data '{path}' holds no tasks; expected <group>/<task>/train.json or <task>.jsonl files"
        )
    names = list(order) if order else sorted(readers)
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
    layout, path = _split(source)
    return sorted(LAYOUTS[layout](path)) if path.exists() else []


def _split(source: str) -> tuple[str, Path]:
    for layout in LAYOUTS:
        if source.startswith(f"{layout}:"):
            return layout, Path(source.removeprefix(f"{layout}:"))
    if source.startswith("cl:"):
        known = ", ".join(layout for layout in LAYOUTS if layout.startswith("cl:"))
        raise UserError(f"data '{source}': unknown layout; known: {known}")
    path = Path(source)
    if path.is_dir() and any(path.glob("*/*/labels.json")):
        return "cl:olora", path
    if path.is_dir() and any(path.glob("*/train.json")):
        return "cl:trace", path
    return "jsonl", path


# ---------------------------------------------------------------------- layouts


def _olora(folder: Path) -> dict[str, Callable[[], RawTask]]:
    """``<group>/<task>/{train,test}.json`` with ``labels.json``, and one ``instructions.json``."""
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

    return {path.parent.name: reader(path.parent) for path in sorted(folder.glob("*/*/labels.json"))}


def _trace(folder: Path) -> dict[str, Callable[[], RawTask]]:
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

    return {path.parent.name: reader(path.parent) for path in sorted(folder.glob("*/train.json"))}


def _jsonl(path: Path) -> dict[str, Callable[[], RawTask]]:
    """One ``.jsonl`` file, or a folder of ``<task>.jsonl`` files or ``<task>/train.jsonl`` folders."""
    if path.is_file():
        return {path.stem: lambda: _jsonl_task(path.stem, path, None, None)}
    found: dict[str, Callable[[], RawTask]] = {}
    for file in sorted(path.glob("*.jsonl")):
        found[file.stem] = lambda file=file: _jsonl_task(file.stem, file, None, None)
    for file in sorted(path.glob("*/train.jsonl")):
        folder = file.parent
        found[folder.name] = lambda folder=folder: _jsonl_task(
            folder.name, folder / "train.jsonl", folder / "test.jsonl", folder / "labels.json"
        )
    return found


LAYOUTS: dict[str, Callable[[Path], dict[str, Callable[[], RawTask]]]] = {
    "cl:olora": _olora,
    "cl:trace": _trace,
    "jsonl": _jsonl,
}


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
        for file, part in ((train, items), (test, task.test or [])):
            for index, item in enumerate(part):
                _check_label(item["label"], task.labels, f"{file}:{index + 1}")
    return task


# ---------------------------------------------------------------------- files and items


def _lines(path: Path) -> tuple[list[dict[str, Any]], str]:
    items: list[dict[str, Any]] = []
    form = ""
    for number, line in enumerate(_text(path).splitlines(), 1):
        where = f"{path}:{number}"
        if not line.strip():
            raise UserError(f"{where}: an empty line; every line holds one JSON object")
        try:
            item = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(item, dict):
            raise UserError(f"{where}: a {type(item).__name__}, where a JSON object is expected")
        this = _form(item, where)
        if form and this != form:
            raise UserError(
                f"{where}: this item is of the form '{this}', those before it '{form}'; use one form a file"
            )
        form = this
        items.append({key: item[key] for key in FORMS[form]})
    return _not_empty(items, path), form


def _form(item: dict[str, Any], where: str) -> str:
    for form, keys in FORMS.items():
        if all(key in item for key in keys):
            _need(item, keys, where)
            return form
    forms = "; ".join("+".join(keys) for keys in FORMS.values())
    raise UserError(f"{where}: keys {', '.join(item) or 'none'} fit no known form ({forms})")


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, list):
        raise UserError(f"{path}: a {type(value).__name__}, where a JSON array of items is expected")
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
    return labels


def _instructions(folder: Path) -> dict[str, str]:
    for name in ("instructions.json", "instruction_config.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            value = json.loads(_text(path))
            return {group: entries[0]["instruction"] for group, entries in value.items()}
        except (ValueError, AttributeError, LookupError, TypeError):
            raise UserError(
                f'{path}: expected {{"<group>": [{{"instruction": "..."}}]}}, as in the CL benchmark'
            ) from None
    return {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"data file '{path}' does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"data file '{path}' is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"data file '{path}' cannot be read: {error.strerror}") from None


def _need(item: Any, keys: dict[str, Any], where: str) -> None:
    if not isinstance(item, dict):
        raise UserError(f"{where}: a {type(item).__name__}, where a JSON object is expected")
    for key, kind in keys.items():
        if key not in item:
            raise UserError(f"{where}: the key '{key}' is missing{did_you_mean(key, item)}")
        if not isinstance(item[key], kind):
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise UserError(f"{where}: '{key}' is {type(item[key]).__name__}, where {wanted} is expected")


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
