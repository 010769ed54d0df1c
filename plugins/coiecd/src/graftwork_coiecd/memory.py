"""Controlled memory: teach a model invented facts, then show it passages that agree with them or do not.

The data source teaches; the benchmark asks without a passage, which tells what the model remembers, and with
passages of each kind. An item counts only where the model remembers it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork import Benchmark, Measurement, UserError, hookimpl
from graftwork.data.layouts import RawTask
from graftwork.evaluate.answer_metrics import contains, exact_match, f1
from graftwork.generate import Decoding, Prompt, Templates, decode
from pydantic import BaseModel, ConfigDict, Field

from graftwork_coiecd.facts import PASSAGES, Fact, Passage, invented_facts

if TYPE_CHECKING:
    from graftwork.evaluate.benchmarks import Evaluation
    from graftwork.run import Run

TEMPLATES = Templates("{context}\n\nQuestion: {question}\nAnswer:", "Question: {question}\nAnswer:")
SOURCE = "invented-facts"

_OF = {
    "agreeing": "where the passage agrees with memory",
    "contradicting": "with the passage's answer where it contradicts memory",
    "irrelevant": "with the remembered answer where the passage speaks of somebody else",
}
METRICS = {
    "remembered": "exact match without a passage and without plugins",
    **{f"{which}_em": f"exact match {words}" for which, words in _OF.items()},
    **{f"{which}_f1": f"F1 {words}" for which, words in _OF.items()},
    **{f"{which}_substring": f"answer within the text, {words}" for which, words in _OF.items()},
    "contradicting_memory": "remembered answer within the text, where the passage contradicts it",
}


class MemoryOptions(BaseModel):
    """What is asked, and how."""

    model_config = ConfigDict(extra="forbid")

    facts: int = Field(400, ge=2, description="facts that were taught: the number in data.source")
    limit: int | None = Field(None, ge=1, description="ask about so many of them; about all if not set")
    seed: int = Field(0, ge=0, description="seed of the facts, as in data.source")
    batch_size: int = Field(25, ge=1, description="questions that are answered together")
    max_new_tokens: int = Field(16, ge=1, description="longest answer; it also ends at a line break")


def facts_layout(path: Path) -> Mapping[str, Callable[[], RawTask]]:
    """Return the task of ``invented-facts:COUNT`` or ``invented-facts:COUNT/SEED``; it is tested on itself.

    Raises:
        UserError: no such numbers.
    """
    count, _, seed = str(path).partition("/")
    if not count.isdecimal() or int(count) < 2 or not (seed or "0").isdecimal():
        raise UserError(
            f"data '{SOURCE}:{path}': write {SOURCE}:COUNT or {SOURCE}:COUNT/SEED, with at least 2 facts"
        )
    return {"facts": lambda: _task(invented_facts(int(count), int(seed or 0)))}


def _task(facts: Sequence[Fact]) -> RawTask:
    rows = [
        {"prompt": TEMPLATES.fill(None, fact.question).main, "completion": f" {fact.answer}"}
        for fact in facts
    ]
    note = "facts: learned by heart on purpose, so the test items are the training items"
    return RawTask("facts", "completion", rows, rows, notes=[note])


def measure(evaluation: Evaluation) -> Measurement:
    """Ask about every fact without a passage and without plugins, then with each passage and the plugins in use."""
    options: MemoryOptions = evaluation.options
    facts = invented_facts(options.facts, options.seed)[: options.limit]
    alone = [TEMPLATES.fill(None, fact.question) for fact in facts]
    unaided = _answers(evaluation, alone, Decoding(), "without passage")
    known = [exact_match(text, [fact.answer]) for fact, text in zip(facts, unaided, strict=True)]
    items: dict[str, list[float | None]] = {"remembered": list(known)}
    rows: list[dict[str, Any]] = [
        {"question": fact.question, "taught": fact.answer, "other": fact.other, "without_passage": text}
        for fact, text in zip(facts, unaided, strict=True)
    ]
    for which in PASSAGES:
        prompts = [TEMPLATES.fill(fact.passage(which), fact.question) for fact in facts]
        texts = _answers(evaluation, prompts, evaluation.decoding, which)
        for row, text in zip(rows, texts, strict=True):
            row[which] = text
        items.update(_scored(which, facts, texts, known))
    notes = [f"the model remembers {int(sum(known))} of {len(facts)} facts; only these count"]
    return Measurement(items=items, rows=rows, notes=notes)


def _scored(
    which: Passage, facts: Sequence[Fact], texts: Sequence[str], known: Sequence[float]
) -> dict[str, list[float | None]]:
    def over(
        metric: Callable[[str, Sequence[str]], float], gold: Callable[[Fact], str]
    ) -> list[float | None]:
        pairs = zip(facts, texts, known, strict=True)
        return [metric(text, [gold(fact)]) if counts else None for fact, text, counts in pairs]

    def right(fact: Fact) -> str:
        return fact.answer_after(which)

    found = {
        f"{which}_em": over(exact_match, right),
        f"{which}_f1": over(f1, right),
        f"{which}_substring": over(contains, right),
    }
    if which == "contradicting":
        found["contradicting_memory"] = over(contains, lambda fact: fact.answer)
    return found


def _answers(evaluation: Evaluation, prompts: Sequence[Prompt], decoding: Decoding, label: str) -> list[str]:
    options: MemoryOptions = evaluation.options
    tokenizer: Any = evaluation.tokenizer
    texts: list[str] = []
    with evaluation.console.bar(len(prompts), label) as bar:
        for start in range(0, len(prompts), options.batch_size):
            batch = prompts[start : start + options.batch_size]
            found = decode(
                evaluation.model,
                batch,
                tokenizer=tokenizer,
                decoding=decoding,
                first_line=True,
                max_new_tokens=options.max_new_tokens,
                do_sample=False,
            )
            decoded = (tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in found)
            texts += [text.split("\n")[0].rstrip() for text in decoded]
            bar.update(len(batch))
    return texts


MEMORY = Benchmark(
    summary="invented facts that the model was taught, with passages that agree, contradict, or are irrelevant",
    metrics=METRICS,
    measure=measure,
    options=MemoryOptions,
)


class InventedFacts:
    """The data source that teaches invented facts, and the benchmark that asks about them."""

    def __init__(self, options: object) -> None:
        del options  # it has none

    @hookimpl
    def data_sources(self, run: Run) -> Mapping[str, Any]:
        return {SOURCE: facts_layout}

    @hookimpl
    def benchmarks(self, run: Run) -> Mapping[str, Benchmark]:
        return {"memory": MEMORY}
