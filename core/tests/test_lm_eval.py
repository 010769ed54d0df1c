"""Tasks of lm-eval-harness: likelihoods and answers as its own adapter gives them, and with plugins in use."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import Combiner, UserError
from graftwork.console import Console
from graftwork.evaluate.continuations import answer_pair, continuation_likelihoods, first_choices
from graftwork.evaluate.lm_eval import EXTRA, as_measurement, benchmark
from graftwork.generate import Decoding
from graftwork.run import Run
from graftwork.testing.models import tiny_checkpoint, tiny_model, tiny_tokenizer
from transformers import LogitsProcessor

TOKENIZER = tiny_tokenizer()
PAIRS = [
    ([5, 6, 7], [8, 9]),
    ([10], [11]),
    ([20, 21, 22, 23, 24, 25], [2, 30, 31]),  # an end token inside
    ([40, 41], [42, 43, 44, 45]),
]
WITH_EXTRA = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason=f"needs the extra {EXTRA}"
)


class Bent(LogitsProcessor):
    """Make one token likelier."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        bent = scores.clone()
        bent[:, 9] += 3
        return bent


def by_hand(model: Any, prompt: list[int], answer: list[int], bent: float = 0.0) -> tuple[float, bool]:
    total, likeliest = 0.0, True
    for place, token in enumerate(answer):
        logits = model(torch.tensor([prompt + answer[:place]])).logits[0, -1].double()
        logits[9] += bent
        total += logits.log_softmax(-1)[token].item()
        likeliest &= int(logits.argmax()) == token
    return total, likeliest


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_are_those_of_single_passes(kind: str, batch_size: int) -> None:
    model = tiny_model(kind, dtype=torch.float64)
    greedy = model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False, eos_token_id=258)
    pairs = [*PAIRS, ([5, 6], greedy[0, 2:].tolist())]
    expected = [by_hand(model, *pair) for pair in pairs]
    assert expected[-1][1]
    for decoding in (Decoding(), Decoding(before_forward=[lambda coming: None])):
        found = continuation_likelihoods(model, TOKENIZER, pairs, decoding=decoding, batch_size=batch_size)
        assert [one[1] for one in found] == [one[1] for one in expected]
        assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_first_choices_are_those_of_single_passes(batch_size: int) -> None:
    model = tiny_model(dtype=torch.float64)
    greedy = model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False, eos_token_id=258)
    pairs = [*PAIRS, ([5, 6], [*greedy[0, 2:].tolist(), 7])]
    expected = [
        [by_hand(model, prompt + answer[:place], [token])[1] for place, token in enumerate(answer)]
        for prompt, answer in pairs
    ]
    assert expected[-1][:3] == [True] * 3
    assert first_choices(model, TOKENIZER, pairs, batch_size=batch_size) == expected


def test_an_item_is_parted_where_its_answer_begins() -> None:
    end = TOKENIZER.eos_token_id
    plain = answer_pair(TOKENIZER, "Say so:", " yes")
    assert (TOKENIZER.decode(plain[0]), TOKENIZER.decode(plain[1][:-1])) == ("Say so:", " yes")
    assert plain[1][-1] == end
    chat = answer_pair(
        TOKENIZER, [{"role": "user", "content": "hm"}], [{"role": "assistant", "content": "ah"}]
    )
    assert TOKENIZER.decode(chat[0]) == "<user>hm\n<assistant>"
    assert TOKENIZER.decode(chat[1]) == "ah\n"
    with pytest.raises(UserError, match="a prompt is empty"):
        answer_pair(TOKENIZER, "", "a")


def test_what_changes_decoding_changes_likelihoods() -> None:
    model, amateur = tiny_model(dtype=torch.float64), tiny_model(seed=1, dtype=torch.float64)
    bent = continuation_likelihoods(model, TOKENIZER, PAIRS, decoding=Decoding(processors=[Bent()]))
    expected = [by_hand(model, *pair, bent=3.0) for pair in PAIRS]
    assert [one[0] for one in bent] == pytest.approx([one[0] for one in expected], rel=1e-5)
    # Scores of an amateur alone: its own likelihoods.
    combiner = Combiner("amateur alone", lambda main, contrast: contrast, amateur)
    found = continuation_likelihoods(model, TOKENIZER, PAIRS, decoding=Decoding(combiner))
    expected = [by_hand(amateur, *pair) for pair in PAIRS]
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], rel=1e-5)


def test_what_has_no_likelihood_is_refused() -> None:
    combiner = Combiner("contrast", lambda main, contrast: main)
    with pytest.raises(UserError, match="have no context apart"):
        continuation_likelihoods(tiny_model(), TOKENIZER, PAIRS, decoding=Decoding(combiner))
    with pytest.raises(UserError, match="decoder-only"):
        continuation_likelihoods(tiny_model("t5"), TOKENIZER, PAIRS)
    with pytest.raises(UserError, match="1100 tokens do not fit the model's window of 1024"):
        continuation_likelihoods(tiny_model(), TOKENIZER, [([5] * 1100, [6])])


def test_items_where_a_metric_is_their_mean() -> None:
    def sample(item: int, kind: str, **metrics: Any) -> dict[str, Any]:
        return {
            "doc_id": item,
            "filter": kind,
            "target": "a",
            "filtered_resps": ["a"],
            "metrics": list(metrics),
            **metrics,
        }

    result = {
        "results": {
            "one": {"alias": "one", "acc,none": 0.5, "acc_stderr,none": "N/A", "odd,none": 3.0},
            "two": {"em,strict-match": 1.0, "em,flexible": 0.5, "ppl,flexible": 7.0},
        },
        "samples": {
            "one": [sample(1, "none", acc=0.0, odd=1), sample(0, "none", acc=1.0, odd=2)],
            "two": [
                *(sample(item, "strict-match", em=1) for item in range(2)),
                *(sample(item, "flexible", em=item, ppl=(1.0, 2)) for item in range(2)),
            ],
        },
    }
    known = dict.fromkeys(["one_acc", "two_em_strict_match", "two_em_flexible", "two_ppl_flexible"], "")
    found = as_measurement(result, known, cut=2)
    assert found.items == {
        "one_acc": [1.0, 0.0],
        "two_em_strict_match": [1.0, 1.0],
        "two_em_flexible": [0.0, 1.0],
    }
    assert found.values == {"two_ppl_flexible": 7.0}
    assert found.notes == [
        "2 prompts did not fit the model's window and lost their beginning",
        "one does not declare its metric odd (none), which was 3",
    ]
    assert len(found.rows) == 6
    assert json.loads(json.dumps(found.rows)) == found.rows


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the extra is installed")
def test_without_the_extra_the_cure_is_named() -> None:
    with pytest.raises(UserError, match=r"pip install graftwork\[lm-eval\]"):
        benchmark(["arc_easy"])


# ---------------------------------------------------------------------- with the extra

CHOICES = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ANSWERS = """
task: tiny_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["~"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - metric: exact_match
"""
TEXTS = """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    data = tmp_path / "data.jsonl"
    records = [
        {"question": f"Which comes after {word}?", "choices": ["one", "two", "three four"], "gold": index % 3}
        for index, word in enumerate(["zero", "one", "two", "three", "a", "b" * 9, "c"])
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    paths = []
    for name, text in (("choice", CHOICES), ("answer", ANSWERS), ("text", TEXTS)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text.format(data=data))
        paths.append(str(path))
    return paths


def measured(tasks: list[str], model: Any, decoding: Decoding, **options: Any) -> Any:
    from graftwork.evaluate.benchmarks import Evaluation
    from graftwork.recipe import Job

    found = benchmark(tasks)
    assert found.options is not None
    run = Run(Path(), Job.model_validate({"model": {"ref": "tiny"}, "data": {"source": "none"}}))
    given = found.options.model_validate(options)
    measurement = found.measure(Evaluation(run, model, TOKENIZER, decoding, given, Console(enabled=False)))
    assert set(measurement.items) | set(measurement.values) <= set(found.metrics)
    return measurement


@WITH_EXTRA
def test_tasks_give_what_lm_evals_own_adapter_gives(tasks: list[str], tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    folder = tiny_checkpoint(tmp_path / "model")
    model = tiny_model()
    reference: Any = simple_evaluate(
        model=HFLM(str(folder), device="cpu", batch_size=3), tasks=tasks, bootstrap_iters=0
    )
    found = measured(tasks, model, Decoding(), batch_size=3)
    theirs = reference["results"]
    assert set(found.items) == {"tiny_choice_acc", "tiny_choice_acc_norm", "tiny_answer_exact_match"}
    for name, key in (("acc", "acc,none"), ("acc_norm", "acc_norm,none")):
        values = found.items[f"tiny_choice_{name}"]
        assert sum(values) / len(values) == pytest.approx(theirs["tiny_choice"][key])
    for name in ("word_perplexity", "byte_perplexity"):
        assert found.values[f"tiny_text_{name}"] == pytest.approx(
            theirs["tiny_text"][f"{name},none"], rel=1e-5
        )
    for task in ("tiny_choice", "tiny_answer"):
        ours = [row["answer"] for row in found.rows if row["task"] == task]
        given = [sample["filtered_resps"] for sample in reference["samples"][task]]
        if task == "tiny_answer":
            assert ours == given
        else:
            flat = (
                [[value for value, _ in one] for one in ours],
                [[float(v) for v, _ in one] for one in given],
            )
            torch.testing.assert_close(*map(torch.tensor, flat), rtol=1e-4, atol=1e-4)


@WITH_EXTRA
def test_plugins_take_part_in_likelihoods_and_answers(tasks: list[str]) -> None:
    model, passes = tiny_model(), []
    plain = measured(tasks[:2], model, Decoding())
    decoding = Decoding(processors=[Bent()], before_forward=[passes.append])
    bent = measured(tasks[:2], model, decoding)
    assert passes
    assert [row["answer"] for row in bent.rows] != [row["answer"] for row in plain.rows]
    # The neutral element in the same loop changes nothing.
    neutral = measured(tasks[:2], model, Decoding(before_forward=[passes.append]))
    assert neutral.items == plain.items


@WITH_EXTRA
def test_limits_and_examples(tasks: list[str]) -> None:
    found = measured(tasks[:1], tiny_model(), Decoding(), limit=2, num_fewshot=1)
    assert [len(values) for values in found.items.values()] == [2, 2]
    # A second run of the same tasks in one process begins afresh.
    assert len(measured(tasks[:1], tiny_model(), Decoding()).items["tiny_choice_acc"]) == 7


@WITH_EXTRA
def test_a_long_prompt_loses_its_beginning_and_it_is_told(tasks: list[str]) -> None:
    found = measured(tasks[:1], tiny_model(max_position_embeddings=24), Decoding())
    assert any("lost their beginning" in note for note in found.notes)


@WITH_EXTRA
@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["arc_esay"], r"lm-eval has no task 'arc_esay' \(did you mean 'arc_easy'\?\)"),
        ([], "names no task"),
        (["nowhere.yaml"], "lm-eval cannot load nowhere.yaml"),
    ],
)
def test_tasks_that_are_not_there(names: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        benchmark(names)


@WITH_EXTRA
def test_a_combiner_without_contexts_is_refused(tasks: list[str]) -> None:
    combiner = Combiner("contrast", lambda main, contrast: main)
    with pytest.raises(UserError, match="the requests of lm-eval have no context apart"):
        measured(tasks[:1], tiny_model(), Decoding(combiner))
