"""Make a stream of tasks from what lies on disk: drawn, rendered, numbered."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from pyarrow import ArrowException

from graftwork.data.layouts import Layout, RawTask, read_tasks
from graftwork.data.options import DataOptions
from graftwork.data.prompts import render
from graftwork.data.tasks import Task
from graftwork.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_VALIDATION = 16
SCORED = ("classification", "completion", "chat")


def build_stream(
    options: DataOptions,
    *,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sources: Mapping[str, Layout] | None = None,
) -> list[Task]:
    """Return the tasks of ``options.source`` in their order, drawn with ``seed`` (or ``draw_seed``).

    Items are drawn plainly, without regard to their labels. ``tokenizer`` is needed for
    ``options.max_prompt_tokens`` only: where the stream is just checked or counted, leave it out and
    prompts keep their length. ``sources`` are the layouts that plugins bring.

    Raises:
        UserError: see :func:`graftwork.data.layouts.read_tasks`; also for too few items to cut a
            validation split from, refused overlaps, and prompts that cannot be cut to their limit.
    """
    raw = read_tasks(options.source, options.order, sources)
    return [_task(task, index, len(raw), options, seed, tokenizer) for index, task in enumerate(raw)]


def held_out_tasks(
    options: DataOptions,
    names: Sequence[str],
    *,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sources: Mapping[str, Layout] | None = None,
) -> list[Task]:
    """Return tasks of the same source that the stream does not train on.

    Raises:
        UserError: one of them is in the stream, or has no test items.
    """
    order = options.order or []
    for name in names:
        if name in order or not order:
            raise UserError(
                f"evaluate.general.tasks names '{name}', which the stream trains on; leave it out of one"
            )
    chosen = options.model_copy(update={"order": list(names)})
    tasks = build_stream(chosen, seed=seed, tokenizer=tokenizer, sources=sources)
    for task in tasks:
        if task.test is None:
            raise UserError(f"evaluate.general.tasks names '{task.name}', which has no test items")
    return tasks


def _task(
    raw: RawTask,
    index: int,
    total: int,
    options: DataOptions,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Task:
    notes = list(raw.notes)
    chosen = f"{options.draw_seed if options.draw_seed is not None else seed}/{raw.name}"
    train, test = raw.train, raw.test
    if options.validation is not None:
        if raw.form not in SCORED:
            raise UserError(
                f"data.validation: items of task '{raw.name}' ({raw.form}) have no answer to score"
            )
        train, test = _split(raw, options.validation, f"{chosen}/validation")
        notes.append(f"{raw.name}: scored on {len(test)} of its own training items, which are not trained on")
    if test is not None:
        shared = _overlap(raw.form, train, test)
        if shared:
            text = (
                f"{raw.name}: {len(shared)} test items also stand in the training items, word for word, "
                f"the first as '{shared[0]}'"
            )
            if options.overlap == "refuse":
                raise UserError(f"task {text}; remove them, or set data.overlap to report")
            notes.append(text)
        test = _answers_apart(test) if raw.form == "chat" else test
        if raw.form not in SCORED or not test:
            notes.append(f"{raw.name}: test items of the form '{raw.form}' without an answer are not scored")
            test = None
    if raw.form != "classification" and options.max_words:
        notes.append(f"{raw.name}: max_words cuts sentences of labelled items only")
    if raw.form not in ("classification", "completion") and options.max_prompt_tokens:
        notes.append(f"{raw.name}: max_prompt_tokens cuts no items of the form '{raw.form}'")
    train = _draw(train, options.train_items, f"{chosen}/train")
    test = None if test is None else _draw(test, options.test_items, f"{chosen}/test")
    rendered = render(raw, train, options, tokenizer)
    if raw.form == "classification":
        rendered = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rendered]
    return Task(
        name=raw.name,
        train=_dataset(raw.name, rendered),
        test=None if test is None else _dataset(raw.name, render(raw, test, options, tokenizer)),
        labels=raw.labels,
        index=index,
        total=total,
        notes=notes,
    )


def _draw(items: list[dict[str, Any]], count: int | None, seed: str) -> list[dict[str, Any]]:
    if count is None or count >= len(items):
        return items
    return random.Random(seed).sample(items, count)


def _split(raw: RawTask, share: float, seed: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return training and validation items, both in the order of the file."""
    count = max(LEAST_VALIDATION, round(share * len(raw.train)))
    if count >= len(raw.train):
        raise UserError(
            f"task '{raw.name}' has {len(raw.train)} training items, too few to cut off {count} for "
            f"data.validation; give it more, or leave data.validation out"
        )
    cut = set(random.Random(seed).sample(range(len(raw.train)), count))
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for index, item in enumerate(raw.train):
        parts[index in cut].append(item)
    return parts


def _overlap(form: str, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> list[str]:
    """Return the beginnings of those test items whose question stands among the training items."""
    key = {"classification": "sentence", "chat": "messages", "text": "text"}.get(form, "prompt")

    def asked(item: dict[str, Any]) -> str:
        value = item.get(key, item.get("chosen"))
        return value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True)

    known = {asked(item) for item in train}
    return [" ".join(asked(item).split())[:60] for item in test if asked(item) in known]


def _answers_apart(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return conversations as the messages before the last answer, and that answer."""
    rows = []
    for item in items:
        answers = [i for i, message in enumerate(item["messages"]) if message["role"] == "assistant"]
        if answers and answers[-1] > 0:
            last = answers[-1]
            rows.append({"prompt": item["messages"][:last], "completion": item["messages"][last : last + 1]})
    return rows


def _dataset(name: str, rows: list[dict[str, Any]]) -> Dataset:
    try:
        return Dataset.from_list(rows)
    except (ArrowException, OverflowError, TypeError) as error:
        raise UserError(
            f"task '{name}': a key does not have values of one type in all items ({error})"
        ) from None
