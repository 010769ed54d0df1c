"""Benchmarks: questions in all layouts, the metrics, evaluation jobs of recipes and their claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from graftwork import UserError
from graftwork.cli import cli
from graftwork.data.conflict import read_questions
from graftwork.evaluate.answer_metrics import contains, exact_match, f1
from graftwork.evaluate.bootstrap import item_bootstrap
from graftwork.evaluate.qa import score
from graftwork.expect import judge, parse
from graftwork.generate import Templates
from hypothesis import given
from hypothesis import strategies as st

PLAIN = [
    {"question": f"Where does person {n} live?", "context": f"Person {n} lives in Rome.", "answers": ["Rome"]}
    for n in range(4)
]
RGB = {
    "query": "Who won?",
    "answer": [["Ann", "Ann B."]],
    "fakeanswer": "Bob",
    "positive": ["Ann won."],
    "positive_wrong": ["Bob won.", "It was Bob."],
}
SWAP = {
    "question": "Who won?",
    "org_context": "Ann won.",
    "org_answer": "Ann",
    "sub_context": "Bob won.",
    "sub_answer": "Bob",
}
TEMPLATES = Templates("C: {context} Q: {question}", "Q: {question}")


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def asked(path: Path, **options: Any) -> Any:
    return read_questions(path, templates=TEMPLATES, **options)


def test_generated_questions_need_no_file() -> None:
    wrong, true = (asked(Path("tiny"), documents=which) for which in ("counterfactual", "true"))
    assert len(wrong) == len(true) == 12
    for one, other in zip(wrong, true, strict=True):
        assert one.prompt.contrast == other.prompt.contrast
        assert one.memory == other.answers != one.answers
        assert one.answers[0] in str(one.prompt.main)
        assert one.answers[0] not in str(other.prompt.main)


def test_layouts(tmp_path: Path) -> None:
    plain = asked(lines(tmp_path / "plain.jsonl", PLAIN), limit=2, offset=1)
    assert [one.prompt.contrast for one in plain] == [
        "Q: Where does person 1 live?",
        "Q: Where does person 2 live?",
    ]
    path = lines(tmp_path / "rgb.jsonl", [RGB, {**RGB, "fakeanswer": ""}])
    (wrong,) = asked(path)
    assert (wrong.prompt.main, wrong.answers, wrong.memory) == (
        "C: Bob won.\nIt was Bob. Q: Who won?",
        ("Bob",),
        ("Ann", "Ann B."),
    )
    true = asked(path, documents="true")
    assert [(one.answers, one.memory) for one in true] == [(("Ann", "Ann B."), ())] * 2
    (swapped,) = asked(lines(tmp_path / "swap.jsonl", [SWAP]))
    assert (swapped.answers, swapped.memory) == (("Bob",), ("Ann",))


def test_pairs_are_joined_by_their_index_not_by_their_order(tmp_path: Path) -> None:
    def line(index: int, process: int, text: str) -> dict[str, Any]:
        return {
            "input_index": index,
            "assigned_process": process,
            "context_string": text,
            "gold_answers": f"a{index}",
        }

    records = [line(0, 0, "c0 q0"), line(1, 1, "q1"), line(1, 0, "c1 q1"), line(0, 1, "q0")]
    found = asked(lines(tmp_path / "pairs.jsonl", records))
    assert [(one.prompt.main, one.prompt.contrast, one.answers) for one in found] == [
        ("c0 q0", "q0", ("a0",)),
        ("c1 q1", "q1", ("a1",)),
    ]
    with pytest.raises(UserError, match="input_index 0 has only one of its two lines"):
        asked(lines(tmp_path / "half.jsonl", records[:3]))
    with pytest.raises(UserError, match=r"line 2.*needs one line with assigned_process 0"):
        asked(lines(tmp_path / "twice.jsonl", [records[0], records[0]]))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no questions"),
        ("{broken", "bad.jsonl:1: not valid JSON"),
        ("[1]", "bad.jsonl:1"),
        ('{"a": 1}', "no known layout"),
        ('{"question": "q", "context": ""}', "'context' is missing or empty"),
        ('{"question": "q", "context": "c"}', "'answer' holds no answer"),
    ],
)
def test_bad_questions(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=problem):
        asked(path)


def test_a_line_ends_at_its_line_feed_alone(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({**PLAIN[0], "context": "Rome.\u2028Lyon."}, ensure_ascii=False) + "\n")
    assert "\u2028" in str(asked(path)[0].prompt.main)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        asked(tmp_path / "nothing.jsonl")


def test_answer_metrics() -> None:
    assert exact_match("The Rome!", ["rome"]) == 1
    assert exact_match("in Rome", ["Rome"]) == 0
    assert f1("in Rome", ["Rome"]) == pytest.approx(2 / 3)
    assert f1("", ["Rome"]) == 0
    assert contains("It is in New York.", ["new york"]) == 1
    assert contains("since 2010", ["10"]) == 0


def test_groups_of_known_and_unknown_questions(tmp_path: Path) -> None:
    records = [{**RGB, "answer": f"Ann{n}", "fakeanswer": f"Bob{n}"} for n in range(60)]
    questions = asked(lines(tmp_path / "rgb.jsonl", records))
    # The model alone gives the context's answer to the first 30; it remembers the last ten.
    unaided = [f"Bob{n}" if n < 30 else f"Ann{n}" if n >= 50 else "nobody" for n in range(60)]
    answers = [f"it was Bob{n}" if n % 2 else f"Ann{n}" for n in range(60)]
    found = score(questions, answers, [3] * 60, unaided)
    assert [value is not None for value in found.items["f1_agree"]] == [n < 30 for n in range(60)]
    assert [value is not None for value in found.items["f1_conflict"]] == [n >= 30 for n in range(60)]
    assert [value for value in found.items["memory_kept"] if value is not None] == [1, 0] * 5
    assert found.values["memorisation"] == 0.5
    few = score(questions[:31], answers[:31], [3] * 31, unaided[:31])
    assert "f1_conflict" not in few.items
    assert any("too few" in note for note in few.notes)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=20), st.floats(0.1, 3))
def test_the_interval_is_of_the_difference(values: list[float], factor: float) -> None:
    other = [value + 1 for value in values]
    found = item_bootstrap([(other, values)], draws=50)
    assert found is not None
    interval, count = found
    assert count == len(values)
    assert (interval.difference, interval.low, interval.high) == pytest.approx((1, 1, 1))
    scaled = item_bootstrap([(other, values)], factor=factor, draws=50)
    assert scaled is not None
    mean = sum(values) / len(values)
    assert scaled[0].difference == pytest.approx(mean + 1 - factor * mean, abs=1e-9)


def test_items_that_do_not_count_on_one_side_are_left_out() -> None:
    found = item_bootstrap([([1.0, None, 1.0, 5.0], [0.0, 9.0, 0.0, None])], draws=200)
    assert found is not None
    assert found[1] == 2
    assert (found[0].low, found[0].high) == (1, 1)
    assert item_bootstrap([([None], [1.0])]) is None


def job(name: str, values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    metrics = {"kl": sum(known) / len(known)}
    return {"name": name, "variant": "", "benchmark": "b", "metrics": metrics, "items": {"kl": values}}


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("a.kl < b.kl", "held"),
        ("a.kl < 0.5 * b.kl", "held"),
        ("a.kl < 0.3 * b.kl", "refuted"),
        ("a.kl > b.kl - 4", "held"),
        ("a.kl < 1.2", "held"),
        ("a.kl > 1.2", "refuted"),
        ("a.kl < 1.0", "not decided"),
    ],
)
def test_claims_on_items(text: str, verdict: str) -> None:
    jobs = [job("a", [0.9, 1.0, 1.1, 1.0]), job("b", [2.9, 3.0, 3.1, 3.0])]
    assert judge(parse(text, ["a", "b"], ["kl"]), jobs)["verdict"] == verdict


RECIPE = """
title: answers
model: tiny-random
benchmark: {{name: qa, data: {data}, max_new_tokens: 4, split: true}}
steps:
  - name: plain
  - name: alone
    benchmark: {{context: false}}
  - name: taught
    benchmark: null
    data: tiny
    adapter: {{peft_type: LORA, r: 2, target_modules: all-linear}}
    train: {{max_steps: 2, save_strategy: "no"}}
  - name: after
    model: step:taught
expect:
  - plain.f1 >= alone.f1
"""


def test_a_recipe_of_evaluations_and_a_training_step(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(data=lines(tmp_path / "q.jsonl", PLAIN)))
    output = tmp_path / "out"
    run = CliRunner().invoke(cli, ["run", str(recipe), "--output", str(output)], catch_exceptions=False)
    results = json.loads((output / "results.json").read_text())
    assert run.exit_code == (0 if results["expect"][0]["verdict"] == "held" else 1)
    assert [one["name"] for one in results["jobs"]] == ["plain", "alone", "taught", "after"]
    assert set(results["jobs"][0]["metrics"]) == {"em", "f1", "substring", "tokens"}
    rows = [json.loads(line) for line in (output / "after" / "items.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == [one["question"] for one in PLAIN]
    manifest = json.loads((output / "after" / "manifest.json").read_text())
    assert manifest["job"]["model"]["ref"] == str(output / "taught")
    page = (output / "report.html").read_text()
    assert "What was measured" in page
    assert "F1 with the context" in page
    again = CliRunner().invoke(cli, ["run", str(recipe), "--output", str(output), "--resume"])
    assert again.exit_code == run.exit_code
    assert json.loads((output / "results.json").read_text())["jobs"] == results["jobs"]


def invoke(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        CliRunner().invoke(cli, list(words), catch_exceptions=False, standalone_mode=False)
    return str(caught.value)


def test_what_is_wrong_with_an_evaluation_is_said_before_weights_are_read(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for text, problem in (
        ("benchmark: qb", "no benchmark 'qb'; there are qa"),
        ("benchmark: {name: qa, data: x, limits: 3}", "unknown option 'limits'"),
        ("benchmark: {data: x}", "a benchmark needs its name"),
        (
            "benchmark: {name: qa, data: x}\nsteps: [{name: a, model: step:b}, {name: b}]",
            "no step of that name",
        ),
    ):
        recipe.write_text(f"model: tiny-random\n{text}\n")
        assert problem in invoke("run", str(recipe), "--output", str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_evaluate_writes_json_and_a_page(tmp_path: Path) -> None:
    data = lines(tmp_path / "q.jsonl", PLAIN)
    output = tmp_path / "made" / "answers.json"
    words = ["evaluate", "--model", "tiny-random", "--benchmark", "qa", "--output", str(output)]
    run = CliRunner().invoke(
        cli,
        [*words, "--set", f"benchmark.data={data}", "--set", "benchmark.max_new_tokens=3"],
        catch_exceptions=False,
    )
    assert run.exit_code == 0
    assert "context faithfulness" in run.output
    result = json.loads(output.read_text())
    assert result["metrics"]["tokens"] == pytest.approx(sum(result["items"]["tokens"]) / 4)
    assert output.with_suffix(".html").read_text().startswith("<!doctype html>")
    assert "is not for a benchmark" in invoke(*words, "--text", str(data))
