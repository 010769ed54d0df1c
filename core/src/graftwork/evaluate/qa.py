"""The benchmark ``qa``: questions with a context, answered freely; does the answer follow the context?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from graftwork.data.conflict import Question, read_questions
from graftwork.evaluate.answer_metrics import contains, exact_match, f1
from graftwork.evaluate.benchmarks import Evaluation
from graftwork.generate.decoding import Decoding, decode
from graftwork.generate.prompts import Prompt, Templates, as_chat
from graftwork.hookspecs import Benchmark, Measurement

FEWEST = 30
"""A group of fewer items gets no figure."""

METRICS = {
    "em": "exact match with the context's answer",
    "f1": "F1 with the context's answer",
    "substring": "context faithfulness: the context's answer stands in the answer",
    "memory": "the remembered answer stands in the answer",
    "memorisation": "share of the remembered one among answers with either",
    "memory_kept": "of questions that the model answers from memory, the share still answered so",
    "f1_conflict": "F1 where the model alone does not know the answer (F1 below 0.5)",
    "f1_agree": "F1 where the model alone gives the context's answer (F1 of 0.5 and more)",
    "substring_conflict": "faithfulness where the model alone does not know the answer",
    "substring_agree": "faithfulness where the model alone gives the context's answer",
    "tokens": "mean length of an answer in tokens",
}


class TemplateOptions(BaseModel):
    """The texts of the two prompts."""

    model_config = ConfigDict(extra="forbid")

    with_context: str = Field(Templates().with_context, description="holds {context} and {question}")
    without_context: str = Field(Templates().without_context, description="holds {question}")


class QaOptions(BaseModel):
    """What is asked, and how."""

    model_config = ConfigDict(extra="forbid")

    data: str = Field(description="JSONL file of questions with contexts; tiny: generated ones")
    documents: Literal["counterfactual", "true"] = Field(
        "counterfactual", description="which of two contexts is given, where the file has both"
    )
    limit: int | None = Field(None, ge=1, description="so many questions; all if not set")
    offset: int = Field(0, ge=0, description="leave out the first so many questions")
    context: bool = Field(True, description="show the context; off asks the model alone")
    chat: bool | None = Field(
        None, description="ask through the chat template; where not set, when the tokenizer has one"
    )
    templates: TemplateOptions = Field(default_factory=lambda: TemplateOptions.model_validate({}))
    batch_size: int = Field(16, ge=1, description="questions that are answered together")
    max_new_tokens: int = Field(32, ge=1, description="longest answer; it also ends at a line break")
    max_prompt_tokens: int | None = Field(
        None,
        ge=1,
        description="keep the last so many tokens of a prompt; where not set, longer ones are refused",
    )
    split: bool = Field(
        False,
        description="also ask without the context and without plugins, to tell questions that the model knows "
        "from those it does not",
    )


def asked(options: QaOptions, tokenizer: Any) -> tuple[list[Question], list[Prompt]]:
    """Return the questions that ``options`` name, and their prompts as the model gets them.

    Raises:
        UserError: see :func:`graftwork.data.conflict.read_questions`.
    """
    templates = Templates(options.templates.with_context, options.templates.without_context)
    questions = read_questions(
        Path(options.data),
        templates=templates,
        documents=options.documents,
        limit=options.limit,
        offset=options.offset,
    )
    chat = bool(tokenizer.chat_template) if options.chat is None else options.chat
    return questions, [as_chat(one.prompt) if chat else one.prompt for one in questions]


def answer(
    evaluation: Evaluation, prompts: Sequence[Prompt], decoding: Decoding, label: str
) -> list[list[int]]:
    """Return the tokens of every answer; it ends after its first line. Prompts of like length go together."""
    options: QaOptions = evaluation.options
    tokenizer: Any = evaluation.tokenizer
    order = sorted(range(len(prompts)), key=lambda k: -len(str(prompts[k].main)))
    answers: list[list[int]] = [[] for _ in prompts]
    with evaluation.console.bar(len(prompts), label) as bar:
        for start in range(0, len(order), options.batch_size):
            chosen = order[start : start + options.batch_size]
            found = decode(
                evaluation.model,
                [prompts[k] for k in chosen],
                tokenizer=tokenizer,
                decoding=decoding,
                first_line=True,
                max_prompt_tokens=options.max_prompt_tokens,
                max_new_tokens=options.max_new_tokens,
                do_sample=False,
            )
            for k, tokens in zip(chosen, found, strict=True):
                answers[k] = tokens
            bar.update(len(chosen))
    return answers


def measure(evaluation: Evaluation) -> Measurement:
    """Ask every question and compare the answers with what the context says and with what is remembered."""
    options: QaOptions = evaluation.options
    questions, prompts = asked(options, evaluation.tokenizer)
    tokenizer: Any = evaluation.tokenizer
    alone = [Prompt(prompt.contrast or "") for prompt in prompts]
    tokens = answer(evaluation, prompts if options.context else alone, evaluation.decoding, "answer")
    texts = [first_line(tokenizer, one) for one in tokens]
    unaided = None
    if options.split:
        unaided = [
            first_line(tokenizer, one) for one in answer(evaluation, alone, Decoding(), "without context")
        ]
    return score(questions, texts, [len(one) for one in tokens], unaided)


def first_line(tokenizer: Any, tokens: list[int]) -> str:
    """Return the first line of an answer, without special tokens and outer blanks."""
    text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return text.split("\n")[0].rstrip()


def score(
    questions: Sequence[Question],
    answers: Sequence[str],
    lengths: Sequence[int],
    unaided: Sequence[str] | None = None,
) -> Measurement:
    """Return all metrics; ``unaided`` are the model's answers without context (and without plugins)."""
    pairs = list(zip(questions, answers, strict=True))
    items: dict[str, list[float | None]] = {
        "em": [exact_match(text, one.answers) for one, text in pairs],
        "f1": [f1(text, one.answers) for one, text in pairs],
        "substring": [contains(text, one.answers) for one, text in pairs],
        "tokens": [float(length) for length in lengths],
    }
    values: dict[str, float | None] = {}
    notes: list[str] = []
    if any(one.memory for one in questions):
        items["memory"] = [contains(text, one.memory) if one.memory else None for one, text in pairs]
        known = [(s, m) for s, m in zip(items["substring"], items["memory"], strict=True) if m is not None]
        remembered, stated = sum(m or 0 for _, m in known), sum(s or 0 for s, _ in known)
        values["memorisation"] = remembered / (remembered + stated) if remembered + stated else None
    if unaided is not None:
        agree = [f1(text, one.answers) >= 0.5 for one, text in zip(questions, unaided, strict=True)]
        notes.append(
            f"without the context the model gives the context's answer to {sum(agree)} of {len(agree)} questions"
        )
        for group, wanted in (("agree", True), ("conflict", False)):
            members = [one is wanted for one in agree]
            if sum(members) < FEWEST:
                notes.append(f"the group '{group}' has {sum(members)} questions, too few for a figure")
                continue
            for name in ("f1", "substring"):
                items[f"{name}_{group}"] = [
                    value if member else None for value, member in zip(items[name], members, strict=True)
                ]
        if "memory" in items:
            # The same answers, so the same notion of remembering on both sides.
            before = [contains(text, one.memory) for one, text in zip(questions, unaided, strict=True)]
            items["memory_kept"] = [
                value if was else None for value, was in zip(items["memory"], before, strict=True)
            ]
            notes.append(
                f"without the context it gives the remembered answer to {int(sum(before))} questions"
            )
    rows = [
        {"line": one.index, "question": one.question, "answers": one.answers, "answer": text}
        | ({"memory": one.memory} if one.memory else {})
        | ({"without_context": unaided[k]} if unaided is not None else {})
        for k, (one, text) in enumerate(pairs)
    ]
    return Measurement(items=items, values=values, rows=rows, notes=notes)


QA = Benchmark(
    summary="questions with a context: exact match, F1, faithfulness to the context, memory kept",
    metrics=METRICS,
    measure=measure,
    options=QaOptions,
)
