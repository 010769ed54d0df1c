"""Questions with a context whose answer may contradict what a model has memorised, in the layouts in use.

Layouts (each a JSON object per line, recognised by its keys):

- ``plain``: question, context, answers (or answer), and memory where the remembered answer is known;
- ``rgb``: query, answer, fakeanswer, positive, positive_wrong (Chen et al., RGB); which documents become the
  context, and so which answer it supports, is chosen;
- ``pairs``: two lines per question, with the context (assigned_process 0) and without (1), joined by
  input_index; context_string is the whole prompt (the files of context-aware decoding);
- ``swap``: question, org_context, org_answer, sub_context, sub_answer (NQ-Swap): the substituted ones are asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftwork.data.json_lines import objects, read_text
from graftwork.errors import UserError
from graftwork.generate.prompts import Prompt, Templates

Documents = Literal["counterfactual", "true"]
TINY = "tiny"
"""Generated questions instead of a file, in the layout ``rgb``."""


@dataclass(frozen=True)
class Question:
    """``prompt`` asks it with and without its context; ``answers`` are what the context says, ``memory`` what
    is true without it (empty where nobody knows)."""

    index: int
    question: str
    prompt: Prompt
    answers: tuple[str, ...]
    memory: tuple[str, ...] = ()


def read_questions(
    path: Path,
    *,
    templates: Templates,
    documents: Documents = "counterfactual",
    limit: int | None = None,
    offset: int = 0,
) -> list[Question]:
    """Return the questions of a file (or of :data:`TINY`), without the first ``offset``, at most ``limit``.

    Raises:
        UserError: no such file, a broken line, an unknown layout, a missing field, nothing in it.
    """
    records = list(_records(path))
    if not records:
        raise UserError(f"'{path}' has no questions; expected one JSON object per line")
    layout, reader = _layout(records[0][1], f"'{path}' line {records[0][0]}")
    if layout == "pairs":
        found = list(_pairs(records, path))
    else:
        made = (reader(record, _Place(path, number), templates, documents) for number, record in records)
        found = [question for question in made if question is not None]
    found = found[offset:][:limit]
    if not found:
        raise UserError(
            f"'{path}' has no question left (layout {layout}, documents {documents}, offset {offset})"
        )
    return found


@dataclass(frozen=True)
class _Place:
    path: Path
    line: int

    def __str__(self) -> str:
        return f"'{self.path}' line {self.line}"


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if str(path) == TINY:
        from graftwork.testing.data import tiny_questions

        yield from enumerate(tiny_questions(), 1)
        return
    for where, record in objects(read_text(path), str(path)):
        yield int(where.rpartition(":")[2]), record


def _layout(record: Mapping[str, Any], where: str) -> tuple[str, Any]:
    for name, keys, reader in (
        ("pairs", {"input_index", "assigned_process", "context_string"}, None),
        ("rgb", {"query", "answer", "positive"}, _rgb),
        ("swap", {"question", "sub_context", "sub_answer"}, _swap),
        ("plain", {"question", "context"}, _plain),
    ):
        if keys <= set(record):
            return name, reader
    raise UserError(
        f"{where}: no known layout; expected the keys question, context and answers, or those of RGB, of NQ-Swap, "
        f"or of paired prompts (it has: {', '.join(sorted(record)) or 'none'})"
    )


def _plain(record: Mapping[str, Any], where: _Place, templates: Templates, documents: Documents) -> Question:
    question, context = _word(record, "question", where), _word(record, "context", where)
    key = "answers" if "answers" in record else "answer"
    answers = _answers(record.get(key), key, where)
    memory = _answers(record["memory"], "memory", where) if record.get("memory") else ()
    return Question(where.line, question, templates.fill(context, question), answers, memory)


def _rgb(
    record: Mapping[str, Any], where: _Place, templates: Templates, documents: Documents
) -> Question | None:
    question = _word(record, "query", where)
    truth = _answers(record["answer"], "answer", where)
    if documents == "true":
        context, answers, memory = record["positive"], truth, ()
    else:
        context = record.get("positive_wrong")
        if not context or not record.get("fakeanswer"):
            return None
        answers, memory = _answers(record["fakeanswer"], "fakeanswer", where), truth
    if not isinstance(context, list) or not all(isinstance(one, str) for one in context):
        raise UserError(f"{where}: documents are a list of texts")
    return Question(where.line, question, templates.fill("\n".join(context), question), answers, memory)


def _swap(record: Mapping[str, Any], where: _Place, templates: Templates, documents: Documents) -> Question:
    question = _word(record, "question", where)
    wanted, other = ("org", "sub") if documents == "true" else ("sub", "org")
    context = _word(record, f"{wanted}_context", where)
    answers = _answers(record.get(f"{wanted}_answer"), f"{wanted}_answer", where)
    memory = () if documents == "true" else _answers(record.get(f"{other}_answer"), f"{other}_answer", where)
    return Question(where.line, question, templates.fill(context, question), answers, memory)


def _pairs(records: list[tuple[int, dict[str, Any]]], path: Path) -> Iterator[Question]:
    """Join the two lines of every question; the order of the lines means nothing."""
    groups: dict[Any, dict[Any, tuple[_Place, Mapping[str, Any]]]] = {}
    for number, record in records:
        where = _Place(path, number)
        process = record.get("assigned_process")
        group = groups.setdefault(record.get("input_index"), {})
        if process not in (0, 1) or process in group:
            raise UserError(
                f"{where}: input_index {record.get('input_index')} needs one line with assigned_process 0 and "
                f"one with 1"
            )
        group[process] = (where, record)
    for index, group in groups.items():
        if len(group) < 2:
            where = next(iter(group.values()))[0]
            raise UserError(
                f"{where}: input_index {index} has only one of its two lines (assigned_process 0, 1)"
            )
        (where, main), (_, contrast) = group[0], group[1]
        texts = _word(main, "context_string", where), _word(contrast, "context_string", where)
        answers = _answers(main.get("gold_answers"), "gold_answers", where)
        yield Question(where.line, texts[1], Prompt(*texts), answers)


def _word(record: Mapping[str, Any], key: str, where: _Place) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: '{key}' is missing or empty; expected a text")
    return value


def _answers(value: Any, key: str, where: _Place) -> tuple[str, ...]:
    """Return the texts in ``value``, which may be nested lists."""
    found: list[str] = []

    def collect(part: Any) -> None:
        if isinstance(part, str | int | float) and not isinstance(part, bool):
            found.append(str(part))
        elif isinstance(part, list):
            for one in part:
                collect(one)

    collect(value)
    found = [text for text in found if text.strip()]
    if not found:
        raise UserError(f"{where}: '{key}' holds no answer")
    return tuple(dict.fromkeys(found))
