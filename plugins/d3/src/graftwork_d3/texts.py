"""What is scored: prompts with the full model's own greedy answers, or windows of a text."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork import UserError
from graftwork.data.json_lines import objects, read_text
from graftwork.data.texts import text_windows
from graftwork.evaluate.benchmarks import Evaluation
from graftwork.evaluate.encoding import encode_prompt
from graftwork.generate import Decoding, Prompt, decode
from graftwork.generate.prompts import as_chat
from pydantic import BaseModel, ConfigDict, Field

TINY = "tiny"
# Tokens of a text before the window that is scored, as in the pilot of this method's notes.
TEXT_PROMPT = 64


@dataclass(frozen=True)
class Scored:
    """Tokens of a prompt and of what follows it; ``name`` says which item it is."""

    name: str
    prompt: list[int]
    answer: list[int]


class TextOptions(BaseModel):
    """Where prompts come from, and how long answers are."""

    model_config = ConfigDict(extra="forbid")

    data: str | None = Field(
        None,
        description="JSONL of questions, answered greedily by the full model; 'tiny' for made-up sums",
    )
    text: str | None = Field(None, description="plain text instead of data: windows of it, as they stand")
    limit: int = Field(12, ge=1, description="questions, or windows, that are scored")
    offset: int = Field(0, ge=0, description="leave out the first so many questions")
    max_new_tokens: int = Field(128, ge=4, description="longest answer, and length of a window, in tokens")
    chat: bool | None = Field(
        None, description="ask through the chat template; when there is one, if not set"
    )
    batch_size: int = Field(12, ge=1, description="questions that are answered together")
    answers: str | None = Field(
        None, description="an answers.json that an earlier measurement of the same questions wrote"
    )


def scored_texts(evaluation: Evaluation) -> list[Scored]:
    """Return the items that the options name; greedy answers are written by the model without any plugin.

    Raises:
        UserError: no source or two, a file that cannot be read, answers that are not to these questions.
    """
    options: TextOptions = evaluation.options
    if (options.data is None) == (options.text is None):
        raise UserError("give benchmark.data (questions) or benchmark.text (a plain text), one of them")
    if options.text is not None:
        return _windows(Path(options.text), evaluation.tokenizer, options)
    tokenizer: Any = evaluation.tokenizer
    questions = read_questions(str(options.data), options.limit, options.offset)
    chat = bool(tokenizer.chat_template) if options.chat is None else options.chat
    prompts = [as_chat(Prompt(one)) if chat else Prompt(f"Question: {one}\nAnswer:") for one in questions]
    encoded = [encode_prompt(tokenizer, prompt.main) for prompt in prompts]
    written = options.answers
    answers = _greedy(evaluation, prompts) if written is None else _written(Path(written), encoded)
    return [
        Scored(f"question {options.offset + number}", ids, answer)
        for number, (ids, answer) in enumerate(zip(encoded, answers, strict=True), 1)
    ]


def _greedy(evaluation: Evaluation, prompts: Sequence[Prompt]) -> list[list[int]]:
    options: TextOptions = evaluation.options
    found: list[list[int]] = []
    with evaluation.console.bar(len(prompts), "full model's answers") as bar:
        for start in range(0, len(prompts), options.batch_size):
            some = prompts[start : start + options.batch_size]
            found += decode(
                evaluation.model,
                some,
                tokenizer=evaluation.tokenizer,
                decoding=Decoding(),
                max_new_tokens=options.max_new_tokens,
                do_sample=False,
            )
            bar.update(len(some))
    return found


def answers_json(items: Sequence[Scored]) -> dict[str, Any]:
    """Return what ``answers`` reads back."""
    return {"prompts": digest(items), "answers": [one.answer for one in items]}


def _written(path: Path, encoded: Sequence[Sequence[int]]) -> list[list[int]]:
    if not path.is_file():
        raise UserError(f"benchmark.answers: '{path}' does not exist; d3:fidelity and d3:tune write one")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        prompts, answers = values["prompts"], values["answers"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"benchmark.answers: '{path}' is not an answers.json as d3:fidelity writes it"
        ) from None
    mine = digest([Scored("", list(ids), []) for ids in encoded])
    if prompts != mine or len(answers) != len(encoded):
        raise UserError(f"benchmark.answers: '{path}' answers other questions than these; leave it out")
    return answers


def digest(items: Sequence[Scored]) -> str:
    """Return a hash of the prompts' tokens."""
    return hashlib.sha256(json.dumps([one.prompt for one in items]).encode()).hexdigest()


def read_questions(source: str, limit: int, offset: int) -> list[str]:
    """Return questions from a JSONL file, or made-up ones.

    Raises:
        UserError: no such file; a line without a question; fewer than one question after ``offset``.
    """
    if source == TINY:
        return made_up(limit + offset)[offset:]
    found: list[str] = []
    for where, record in objects(read_text(Path(source)), source):
        question = record.get("question")
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"{where}: needs a text 'question'")
        found.append(question)
        if len(found) == offset + limit:
            break
    if len(found) <= offset:
        raise UserError(
            f"data file '{source}' has {len(found)} questions, and the first {offset} are left out"
        )
    return found[offset:]


def made_up(count: int) -> list[str]:
    """Return questions about sums, the same ones every time."""
    draw = random.Random(0)
    return [
        f"Ann has {draw.randint(2, 40)} apples and buys {draw.randint(2, 40)} more. How many has she now?"
        for _ in range(count)
    ]


def _windows(path: Path, tokenizer: Any, options: TextOptions) -> list[Scored]:
    """Return windows evenly spaced over the text: the first tokens of each are its prompt."""
    windows = text_windows(path, tokenizer, TEXT_PROMPT + options.max_new_tokens).tolist()
    if len(windows) < options.limit:
        raise UserError(
            f"text file '{path}' has {len(windows)} windows of {TEXT_PROMPT + options.max_new_tokens} tokens, fewer "
            f"than benchmark.limit = {options.limit}"
        )
    chosen = [number * len(windows) // options.limit for number in range(options.limit)]
    return [Scored(f"window {at + 1}", windows[at][:TEXT_PROMPT], windows[at][TEXT_PROMPT:]) for at in chosen]
