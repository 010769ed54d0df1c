"""Invented facts: the same for a seed, passages that say what they should, and scores of remembered items only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork import Combiner, UserError
from graftwork.console import Console
from graftwork.data.options import DataOptions
from graftwork.data.stream import build_stream
from graftwork.evaluate.benchmarks import Evaluation
from graftwork.generate import Decoding
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork_coiecd.facts import PASSAGES, invented_facts
from graftwork_coiecd.memory import MEMORY, InventedFacts, MemoryOptions, facts_layout

TOKENIZER = tiny_tokenizer()


def test_facts_are_the_same_for_a_seed() -> None:
    assert invented_facts(20) == invented_facts(20)
    assert invented_facts(20) != invented_facts(20, seed=1)
    assert invented_facts(20)[:10] == invented_facts(10)


def test_subjects_are_different_and_answers_are_two() -> None:
    facts = invented_facts(400)
    subjects = [name for fact in facts for name in (fact.subject, fact.stranger)]
    assert len(set(subjects)) == len(subjects) == 800
    assert {fact.kind for fact in facts} == {"city", "year"}
    assert all(fact.answer != fact.other for fact in facts)
    assert not set(subjects) & {answer for fact in facts for answer in (fact.answer, fact.other)}


def test_passages_say_what_they_should() -> None:
    for fact in invented_facts(20):
        texts = {which: fact.passage(which) for which in PASSAGES}
        assert fact.subject in fact.question
        for which, answer in (("agreeing", fact.answer), ("contradicting", fact.other)):
            assert fact.subject in texts[which]
            assert answer in texts[which]
        assert fact.answer not in texts["contradicting"]
        assert fact.subject not in texts["irrelevant"]
        assert fact.answer not in texts["irrelevant"]
        answers = [fact.answer_after(which) for which in PASSAGES]
        assert answers == [fact.answer, fact.other, fact.answer]


def test_the_data_source() -> None:
    sources = InventedFacts(None).data_sources(run=None)  # type: ignore[arg-type]
    (task,) = build_stream(DataOptions(source="invented-facts:6/3"), seed=0, sources=sources)
    facts = invented_facts(6, seed=3)
    assert task.train["completion"] == [f" {fact.answer}" for fact in facts]
    assert task.train["prompt"][0] == f"Question: {facts[0].question}\nAnswer:"
    assert any("learned by heart on purpose" in note for note in task.notes)


@pytest.mark.parametrize("path", ["many", "1", "5/x", ""])
def test_data_that_is_no_number_is_refused(path: str) -> None:
    from pathlib import Path

    with pytest.raises(UserError, match="write invented-facts:COUNT"):
        facts_layout(Path(path))


def evaluation(decoding: Decoding, **options: Any) -> Evaluation:
    given = MemoryOptions(**{"facts": 6, "batch_size": 4, "max_new_tokens": 12, **options})
    return Evaluation(None, tiny_model(), TOKENIZER, decoding, given, Console(enabled=False))  # type: ignore[arg-type]


def answering(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """Let ``decode`` give ``answer(prompt text, whether a combiner takes part)``."""
    from graftwork_coiecd import memory

    def decode(model: Any, prompts: Any, *, tokenizer: Any, decoding: Any, **options: Any) -> Any:
        texts = [answer(prompt.main, decoding.combiner is not None) for prompt in prompts]
        return [tokenizer(text)["input_ids"] for text in texts]

    monkeypatch.setattr(memory, "decode", decode)


def test_only_what_is_remembered_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = invented_facts(6)
    taught = {fact.question: fact.answer for fact in facts}

    def answer(prompt: str, helped: bool) -> str:
        question = next(one for one in taught if one in prompt)
        if not helped:
            return "nothing" if question == facts[2].question else f"{taught[question]}\nmore"
        passage = prompt.split("\n\n")[0]
        return passage.split(". ")[0].split(" in ")[1]

    answering(monkeypatch, answer)
    with_combiner = Decoding(Combiner("c", lambda main, contrast: main))
    found = MEMORY.measure(evaluation(with_combiner))
    assert found.items["remembered"] == [1, 1, 0, 1, 1, 1]
    expected = {"agreeing": 1.0, "contradicting": 1.0, "irrelevant": 0.0}
    for which, value in expected.items():
        for metric in ("em", "f1", "substring"):
            assert found.items[f"{which}_{metric}"] == [value, value, None, value, value, value]
    assert found.items["contradicting_memory"] == [0, 0, None, 0, 0, 0]
    assert found.notes == ["the model remembers 5 of 6 facts; only these count"]
    assert found.rows[0]["taught"] == facts[0].answer
    assert set(found.items) == set(MEMORY.metrics)


def test_a_model_that_keeps_to_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    taught = {fact.question: fact.answer for fact in invented_facts(6)}
    answering(monkeypatch, lambda prompt, helped: next(taught[one] for one in taught if one in prompt))
    found = MEMORY.measure(evaluation(Decoding(), limit=3))
    means = {name: sum(values) / 3 for name, values in found.items.items()}  # type: ignore[arg-type]
    assert means["agreeing_em"] == means["irrelevant_em"] == means["contradicting_memory"] == 1
    assert means["contradicting_em"] == 0


def test_it_runs_on_a_model() -> None:
    torch.manual_seed(0)
    combiner = Combiner("c", lambda main, contrast: main)
    plain = MEMORY.measure(evaluation(Decoding(), limit=4))
    paired = MEMORY.measure(evaluation(Decoding(combiner), limit=4))
    assert plain.rows == paired.rows
    assert len(plain.rows) == 4
