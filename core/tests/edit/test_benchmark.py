"""The benchmark and its metrics: those of the formulas, before and after, together and one after another, undone."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.console import Console
from graftwork.edit.benchmark import METRICS, EditingOptions, measure
from graftwork.edit.edits import EditSet
from graftwork.edit.held import Held
from graftwork.edit.layouts import write_requests
from graftwork.edit.metrics import WORDS, ask, begins_with, fluency, metric_id, same, score_of, tell
from graftwork.edit.plugin import EditOptions
from graftwork.hookspecs import Measurement
from graftwork.testing.editing import REQUESTS, PlainEditor, corpus, editable_model, same_bits, weights


def run(model: Any, tokenizer: Any, file: Path | None, editor: Any = None, **options: Any) -> Measurement:
    given = {"corpus": "random", "held_out": "random", "window": 32, "corpus_windows": 32, **options}
    evaluation: Any = SimpleNamespace(
        options=EditingOptions.model_validate({"requests": str(file) if file else None, **given}),
        model=model,
        tokenizer=tokenizer,
        console=Console(enabled=False),
        run=SimpleNamespace(seed=0),
    )
    return measure(evaluation, "plain", EditOptions.model_validate({}), editor or PlainEditor())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_requests(tmp_path / "edits.jsonl", REQUESTS)
    return tmp_path / "edits.jsonl"


def probability(model: Any, tokenizer: Any, prompt: str, target: str) -> float:
    """Return exp of the mean log-probability per token, the plain way (bytes are tokens here)."""
    ids = tokenizer(f"{prompt} {target}")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return math.exp(sum(float(scores[i - 1, ids[i]]) for i in range(start, len(ids))) / (len(ids) - start))


def test_metrics_are_those_of_the_formulas(model: Any, tokenizer: Any) -> None:
    first = REQUESTS[0]
    (told,) = tell(model, tokenizer, [ask(tokenizer, first)])
    pairs = {
        "efficacy": ("Lyon is in", 1),
        "paraphrase": ("One finds Lyon in", 1),
        "neighborhood": ("Nice is in", -1),
    }
    for name, (prompt, sign) in pairs.items():
        margin = sign * (
            probability(model, tokenizer, prompt, "Rome") - probability(model, tokenizer, prompt, "Gaul")
        )
        assert told.values[f"{name}_margin"] == pytest.approx(margin, abs=1e-7)
        assert told.values[name] == float(margin > 0)
    assert told.values["target_log_prob"] == pytest.approx(
        math.log(probability(model, tokenizer, "Lyon is in", "Rome")), abs=1e-5
    )
    assert told.values["instantiated_log_prob"] == pytest.approx(
        math.log(probability(model, tokenizer, "Bonn is in", "Rome")), abs=1e-5
    )
    assert told.values["generated_accuracy"] == float(begins_with(told.continuation, "Rome"))
    # Five tokens of the neighbour's target, and the one after the prompt that has none.
    assert [len(one) for one in told.likeliest] == [5, 1]
    (bare,) = tell(model, tokenizer, [ask(tokenizer, REQUESTS[1])], generate=False, fluency_tokens=8)
    assert bare.values["paraphrase"] is None
    assert bare.values["fluency"] is not None
    assert "generated_accuracy" not in bare.values


def test_small_formulas() -> None:
    assert score_of({"efficacy": 0.5, "paraphrase": 1.0, "neighborhood": 0.25}) == pytest.approx(3 / 7)
    assert score_of({"efficacy": 0.0, "paraphrase": 1.0, "neighborhood": 1.0}) == 0.0
    assert score_of({"efficacy": 1.0, "paraphrase": None, "neighborhood": 1.0}) is None
    one, two = torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3])
    assert same([one, one], [two, one]) == pytest.approx(5 / 6)
    assert same([], []) is None
    assert begins_with("  rome\n is", " Rome")
    assert not begins_with("Rom", "Rome")
    assert fluency([1] * 50) == 0.0
    # 49 different pairs and 48 different triples.
    assert fluency(list(range(50))) == pytest.approx(2 / 3 * math.log2(49) + 4 / 3 * math.log2(48))


def test_drift_is_the_divergence_of_the_whole_models(made: EditSet, model: Any) -> None:
    windows = corpus(5)[:3]
    held = Held(model, windows)
    assert held.drift().divergence == pytest.approx(0.0, abs=1e-9)
    assert held.drift().perplexity_ratio == 1.0
    with torch.no_grad():
        old = model(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
        with made.apply(model):
            new = model(input_ids=windows).logits[:, :-1].double().log_softmax(-1)
            found = held.drift()
    assert found.tokens == 3 * 31
    assert found.divergence == pytest.approx(float((old.exp() * (old - new)).sum(-1).mean()), rel=1e-3)
    gold = windows[:, 1:, None]
    ratio = float((old.gather(-1, gold) - new.gather(-1, gold)).mean().exp())
    assert found.perplexity_ratio == pytest.approx(ratio, rel=1e-5)
    assert ratio != 1.0


def test_everything_is_measured_and_taken_back(model: Any, tokenizer: Any, file: Path) -> None:
    before = weights(model)
    found = run(model, tokenizer, file, batch="all", fluency_tokens=6)
    assert same_bits(model, before)
    assert set(METRICS) == set(found.items) | set(found.values)
    assert all(len(values) == len(REQUESTS) for values in found.items.values())
    told = tell(model, tokenizer, [ask(tokenizer, one) for one in REQUESTS], generate=False)
    for name in WORDS:
        if name not in ("generated_accuracy", "fluency"):
            assert found.items[f"before_{name}"] == [one.values[name] for one in told]
    assert sum(found.items["target_log_prob"]) > sum(found.items["before_target_log_prob"])  # pyright: ignore
    assert found.values["drift"] > 0  # pyright: ignore
    assert found.values["edited_weights"] == 1
    assert found.items["immediate_accuracy"] == found.items["accuracy"]
    assert found.rows[0]["metric_id"] == metric_id(tokenizer)
    assert any("bit for bit" in note for note in found.notes)
    assert any("2,000 at least" in note for note in found.notes)


def test_batches_apart_are_edits_of_the_same_model(model: Any, tokenizer: Any, file: Path) -> None:
    apart = run(model, tokenizer, file, batch=1)
    alone = run(model, tokenizer, file, limit=1)
    assert apart.items["target_log_prob"][0] == alone.items["target_log_prob"][0]
    together = run(model, tokenizer, file, batch="all")
    assert together.items["target_log_prob"] != apart.items["target_log_prob"]


def test_in_a_sequence_later_edits_count_for_earlier_requests(model: Any, tokenizer: Any, file: Path) -> None:
    before = weights(model)
    seen: list[bool] = []

    class Watched(PlainEditor):
        def edit(self, model: Any, *args: Any, **options: Any) -> EditSet:
            seen.append(same_bits(model, before))
            return super().edit(model, *args, **options)

    found = run(model, tokenizer, file, Watched(), batch=1, sequential=True)
    assert seen == [True, False]
    assert same_bits(model, before)
    apart = run(model, tokenizer, file, batch=1)
    # The first request, at the end, is read from a model with both edits.
    assert found.items["target_log_prob"][0] != apart.items["target_log_prob"][0]
    assert found.items["immediate_accuracy"][0] == apart.items["accuracy"][0]


def test_what_is_missing_is_named(model: Any, tokenizer: Any, file: Path) -> None:
    with pytest.raises(UserError, match=r"set benchmark\.requests=FILE, or =facts"):
        run(model, tokenizer, None)
    with pytest.raises(UserError, match=r"set benchmark\.corpus=FILE"):
        run(model, tokenizer, file, corpus=None)
    file.write_text('{"prompt": "{} is", "subject": "Lyon", "target": ""}\n')
    with pytest.raises(UserError, match="empty target"):
        run(model, tokenizer, file)


def test_a_failing_editor_leaves_the_model(model: Any, tokenizer: Any, file: Path) -> None:
    before = weights(model)

    class Failing(PlainEditor):
        def edit(self, model: Any, *args: Any, **options: Any) -> EditSet:
            if not same_bits(model, before):
                raise UserError("the second edit fails")
            return super().edit(model, *args, **options)

    with pytest.raises(UserError, match="second edit fails"):
        run(model, tokenizer, file, Failing(), batch=1, sequential=True)
    assert same_bits(model, before)


def test_models_of_other_makes_are_measured_too(tokenizer: Any, file: Path) -> None:
    for kind in ("gpt2", "qwen2"):
        found = run(editable_model(kind), tokenizer, file)
        assert found.values["drift"] > 0  # pyright: ignore
