"""The counts of the benchmark ``steps`` against counts made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import Combiner, UserError
from graftwork.console import Console
from graftwork.evaluate.benchmarks import Evaluation
from graftwork.evaluate.qa import QaOptions
from graftwork.generate import Decoding
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork_coiecd import Coiecd, bounds
from graftwork_coiecd.steps import Counted, benchmark, literal_sets

TOKENIZER = tiny_tokenizer()


def logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def counted(method: Coiecd, main: torch.Tensor, contrast: torch.Tensor, live: list[bool]) -> dict[str, int]:
    counts = Counted(method)
    scores = method.scores(main, contrast)
    combiner = Combiner("coiecd", method.scores)
    counts.add(combiner, main, contrast, scores, scores.argmax(-1), torch.tensor(live))
    return dict(counts.counts)


def test_counts_by_hand() -> None:
    # Row 1: two plausible tokens, and the second one gains from the contrast: 0.4^2/0.1 > 0.5^2/0.5.
    # Row 2: one plausible token. Row 3: as row 1, but finished.
    main = logits([0.5, 0.4, 0.1], [0.9, 0.05, 0.05], [0.5, 0.4, 0.1])
    contrast = logits([0.5, 0.1, 0.4], [0.2, 0.4, 0.4], [0.5, 0.1, 0.4])
    found = counted(Coiecd(1.0, 3.0), main, contrast, [True, True, False])
    assert found == {
        "steps": 2,
        "plausible": 1,
        "changed": 1,
        "violating": 1,
        "entropy": 0,
        "closed_form": 0,
        "upper": 0,
    }


def test_the_upper_bound_counts_where_it_decides() -> None:
    # The last token is far down the tail, and so much likelier than without the context that it would win.
    main, contrast = logits([0.6, 0.399, 0.001]), logits([0.6, 0.4, 1e-12])
    found = counted(Coiecd(1.0, 1.2), main, contrast, [True])
    assert (found["plausible"], found["changed"], found["upper"]) == (0, 1, 1)


def test_the_literal_form_is_the_closed_one_whatever_the_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    main, contrast = 3 * torch.randn(2, 50, 300, generator=generator, dtype=torch.float64)
    for ratio in (2.0, 4.0):
        closed = bounds(main, ratio)
        for entropy_too in (True, False):
            literal = literal_sets(main, contrast, ratio, entropy_too=entropy_too)
            assert all(torch.equal(a, b) for a, b in zip(literal, closed, strict=True))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    records = [
        {"question": f"Where is {name}?", "context": f"{name} is here.", "answers": ["here"]}
        for name in "abcde"
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def evaluation(path: Path, decoding: Decoding, **options: Any) -> Evaluation:
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    given = QaOptions(**{"data": str(path), "max_new_tokens": 5, "batch_size": 2, **options})
    return Evaluation(None, model, TOKENIZER, decoding, given, Console(enabled=False))  # type: ignore[arg-type]


def test_every_step_of_a_real_text_is_counted(questions: Path) -> None:
    bench = benchmark(Coiecd())
    found = bench.measure(evaluation(questions, Decoding()))
    assert set(found.values) == set(bench.metrics)
    assert 5 <= found.values["steps"] <= 25
    assert found.values["entropy"] == found.values["closed_form"] == 0
    assert 0 < found.values["plausible"] < 1
    # The size of a batch changes nothing.
    assert bench.measure(evaluation(questions, Decoding(), batch_size=5)).values == found.values


def test_the_neutral_setting_changes_nothing(questions: Path) -> None:
    found = benchmark(Coiecd(1.0, 1.0)).measure(evaluation(questions, Decoding()))
    assert found.values["changed"] == found.values["plausible"] == found.values["violating"] == 0


def test_forms_without_a_literal_one_leave_it_out(questions: Path) -> None:
    for method in (Coiecd(constraint="band"), Coiecd(ratio=math.inf)):
        assert "entropy" not in benchmark(method).measure(evaluation(questions, Decoding())).values


def test_another_combiner_is_refused(questions: Path) -> None:
    other = Decoding(Combiner("other", lambda main, contrast: main))
    with pytest.raises(UserError, match="plugin 'other' decodes another; leave it out"):
        benchmark(Coiecd()).measure(evaluation(questions, other))
