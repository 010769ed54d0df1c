"""The benchmarks: what they measure, what they write, what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import Measurement, UserError
from graftwork.console import Console
from graftwork.evaluate.benchmarks import Evaluation, benchmark_options
from graftwork.generate import Decoding, Prompt, decode
from graftwork.generate.prompts import as_chat
from graftwork.recipe import expand
from graftwork.run import Run
from graftwork.yaml_lines import Document
from graftwork_d3 import DepthSchedule, teacher_forced
from graftwork_d3.benchmarks import BENCHMARKS
from graftwork_d3.compare import FullModel, binned
from graftwork_d3.fidelity import POLICIES
from graftwork_d3.texts import Scored, made_up
from graftwork_d3.tune import Point, pareto, redundancies, starts

LAYERS = 8
SMALL = {"data": "tiny", "limit": 3, "max_new_tokens": 12}


@pytest.fixture
def measure(lively: Any, tokenizer: Any) -> Callable[..., Measurement]:
    """``measure(name, **options)`` runs a benchmark of the plugin on a tiny model."""

    def call(name: str, model: Any = None, **options: Any) -> Measurement:
        job = expand(Document({"model": "tiny-random", "data": "none"}, {}, "test")).jobs[0].job
        benchmark = BENCHMARKS[name]
        chosen = benchmark_options(benchmark, {"name": f"d3:{name}", **SMALL, **options})
        model = lively() if model is None else model
        return benchmark.measure(
            Evaluation(Run(Path(), job), model, tokenizer, Decoding(), chosen, Console(enabled=False))
        )

    return call


def test_distances_are_those_of_the_formulas(lively: Any) -> None:
    model, plan = lively(dtype=torch.float64), DepthSchedule.of(LAYERS, alpha=0.9)
    item = Scored("one", [5, 6, 7], [8, 9, 10, 11])
    full = FullModel(model, item)
    found = full.distance(plan)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    p = teacher_forced(model, ids, 3)[0].float().softmax(-1)
    q = teacher_forced(model, ids, 3, plan)[0].float().softmax(-1)
    assert full.steps == 3
    # The first token comes from the prompt's pass, the same in both.
    assert torch.equal(p[0], q[0])
    for step, token in ((1, 9), (2, 10), (3, 11)):
        kl = float((p[step] * (p[step] / q[step]).log()).sum())
        assert float(found.kl[step - 1]) == pytest.approx(kl, abs=1e-6)
        assert float(found.agree[step - 1]) == float(p[step].argmax() == q[step].argmax())
        assert float(found.nll[step - 1]) == pytest.approx(-float(q[step, token].log()), abs=1e-5)
        entropy = -float((p[step] * p[step].log()).sum())
        assert float(full.entropy()[step - 1]) == pytest.approx(entropy, abs=1e-5)
    own = full.distance()
    assert float(own.kl.abs().max()) == 0
    assert float(own.agree.mean()) == 1


def test_bins_are_means_over_all_tokens_in_them() -> None:
    values = [torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([3.0, 4])]
    assert binned(values, 2) == [(1.5, 2.5), (3.5, 3.5), (5.0, 5.0)]


def test_fidelity(measure: Any, lively: Any, tokenizer: Any) -> None:
    found = measure("fidelity", ratios=[0.75, 0.875])
    assert {f"kl_{name}" for name in POLICIES} <= set(found.items)
    assert all(len(column) == 3 for column in found.items.values())
    assert {*found.items, *found.values} <= set(BENCHMARKS["fidelity"].metrics)
    answers = decode(
        lively(),
        [as_chat(Prompt(one)) for one in made_up(3)],
        tokenizer=tokenizer,
        max_new_tokens=12,
        do_sample=False,
    )
    assert found.files["answers.json"]["answers"] == answers
    assert found.values["depth"] == pytest.approx(0.75, abs=0.01)
    table = found.files["fidelity.json"]["table"]
    assert len(table) == 2 * len(POLICIES)
    for name in POLICIES:
        column = found.items[f"kl_{name}"]
        (row,) = [one for one in table if one["policy"] == name and one["mean_depth_ratio"] < 0.8]
        assert row["kl"] == pytest.approx(sum(column) / 3)
        assert row["kl"] > 0
    titles = [chart.title for chart in found.charts]
    assert titles[:2] == ["KL against mean depth", "Agreement against mean depth"]
    assert {len(line) for line in found.charts[0].series.values()} == {2}
    assert found.values["kl_random_best"] <= sum(found.items["kl_random"]) / 3
    assert "at most" in found.notes[0]
    json.dumps(found.files)


def test_all_policies_have_the_same_mean_depth(measure: Any, monkeypatch: Any) -> None:
    """Also where answers are of different lengths, and for the constant depth, which is whole."""
    from graftwork_d3 import fidelity

    used: dict[str, list[int]] = {name: [0, 0] for name in POLICIES}
    real = fidelity.plans

    def noted(schedule: Any, steps: int, depth: int, random_orders: int) -> Any:
        made = real(schedule, steps, depth, random_orders)
        for name, many in made.items():
            used[name][0] += sum(LAYERS - len(many[0].skipped(step)) for step in range(1, steps + 1))
            used[name][1] += steps
        return made

    monkeypatch.setattr(fidelity, "plans", noted)
    monkeypatch.setattr(
        fidelity,
        "scored_texts",
        lambda evaluation: [Scored("a", [5, 6], [*range(7, 40)]), Scored("b", [5], [*range(9, 20)])],
    )
    measure("fidelity", ratios=[0.75])
    assert used["constant"][0] == 6 * used["constant"][1]
    for name, (layers, steps) in used.items():
        # To a layer of one token.
        assert abs(layers - 6 * steps) <= 1, name


def test_full_depth_is_the_full_model(measure: Any) -> None:
    found = measure("fidelity", ratios=[1.0])
    for name in POLICIES:
        assert max(found.items[f"kl_{name}"]) == 0
    assert all(row["agree"] == 1 for row in found.files["fidelity.json"]["table"])
    assert found.items["nll_d3"] == found.items["nll_full"]
    assert found.values["speedup_bound"] == 1


def test_answers_of_an_earlier_measurement(measure: Any, tmp_path: Path) -> None:
    first = measure("fidelity", ratios=[0.75])
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(first.files["answers.json"]))
    again = measure("fidelity", ratios=[0.75], answers=str(path))
    assert again.items == first.items
    with pytest.raises(UserError, match="answers other questions than these"):
        measure("fidelity", ratios=[0.75], answers=str(path), offset=1)
    path.write_text("{}")
    with pytest.raises(UserError, match=r"is not an answers.json"):
        measure("fidelity", answers=str(path))
    with pytest.raises(UserError, match="does not exist"):
        measure("fidelity", answers=str(tmp_path / "none.json"))


def test_windows_of_a_text(measure: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"word {number} " for number in range(200)))
    # As many windows of 64 and 12 bytes; four of them evenly.
    assert path.stat().st_size // 76 == 22
    found = measure("fidelity", data=None, text=str(path), limit=4, ratios=[0.75])
    assert [row["item"] for row in found.rows] == [f"window {n}" for n in (1, 6, 12, 17)]
    assert all(row["steps"] == 11 for row in found.rows)
    with pytest.raises(UserError, match=r"fewer than benchmark.limit = 500"):
        measure("fidelity", data=None, text=str(path), limit=500)


def test_tune_writes_the_best_point(measure: Any, tmp_path: Path) -> None:
    found = measure("tune", target_ratio=0.75, ratios=[0.875], expected_tokens=40)
    written = found.files["d3.json"]
    schedule = DepthSchedule.from_json(written["schedule"])
    assert schedule.mean_ratio(40) == pytest.approx(0.75, abs=1 / LAYERS)
    here = [row for row in written["grid"] if row["ratio"] == 0.75]
    # Starts 1, 2, 3, 4, and by redundancy.
    assert len(here) == len(starts(LAYERS)) + 1 == 5
    best = min(here, key=lambda row: row["kl"])
    assert sum(found.items["kl"]) / 3 == pytest.approx(best["kl"])
    assert (
        best["layers_leave"] == "by redundancy"
        if isinstance(schedule.order, tuple)
        else best["layers_leave"] == f"from layer {schedule.start}"
    )
    assert found.values["points"] == len(written["grid"])
    path = tmp_path / "d3.json"
    path.write_text(json.dumps(written))
    again = measure("fidelity", config=str(path), ratios=[0.75])
    shown = again.files["fidelity.json"]["schedules"][0]
    assert {**shown, "alpha": 0} == {**json.loads(path.read_text())["schedule"], "alpha": 0}


def test_redundancy_is_one_minus_the_cosine(lively: Any) -> None:
    model = lively(dtype=torch.float64)
    for weight in (model.model.layers[3].self_attn.o_proj.weight, model.model.layers[3].mlp.down_proj.weight):
        torch.nn.init.zeros_(weight)
    item = Scored("one", [5, 6, 7], [8, 9, 10, 11])
    with torch.no_grad():
        hidden = model(torch.tensor([item.prompt + item.answer]), output_hidden_states=True).hidden_states
    found = redundancies(model, [item])
    # The last state is recorded after the final norm.
    for layer in range(LAYERS - 1):
        before, after = hidden[layer][0, 3:], hidden[layer + 1][0, 3:]
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        assert found[layer] == pytest.approx(float((1 - cosine).mean()), abs=1e-6)
    assert min(range(LAYERS), key=found.__getitem__) == 3


def test_the_front_has_what_nothing_beats() -> None:
    schedule = DepthSchedule.of(LAYERS, alpha=0.9)
    points = [
        Point(name, ratio, schedule, [kl], [1.0])
        for name, ratio, kl in (
            ("a", 0.9, 0.1),
            ("b", 0.9, 0.2),
            ("c", 0.8, 0.3),
            ("d", 0.7, 0.25),
            ("e", 0.6, 0.9),
        )
    ]
    assert {point.label for point in pareto(points)} == {"a", "d", "e"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"data": None}, r"give benchmark.data .* or benchmark.text"),
        ({"text": "x.txt"}, r"give benchmark.data .* or benchmark.text"),
        ({"data": "nowhere.jsonl"}, "'nowhere.jsonl' does not exist"),
        ({"ratios": [0.2]}, "0.2 of 8 layers are 2, which is not between the minimum 4 and 8"),
        ({"ratios": []}, "ratios"),
        ({"limti": 3}, "limti"),
        ({"config": "x.json", "tail": 2}, r"benchmark.config brings the layers; remove benchmark.tail"),
    ],
)
def test_bad_options(options: dict[str, Any], problem: str, measure: Any) -> None:
    with pytest.raises(UserError, match=problem):
        measure("fidelity", **options)


def test_bad_questions(tmp_path: Path, measure: Any) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "a"}\n{"quest": "b"}\n')
    with pytest.raises(UserError, match=r"data.jsonl:2: needs a text 'question'"):
        measure("fidelity", data=str(path))
    with pytest.raises(UserError, match="has 1 questions, and the first 1 are left out"):
        path.write_text('{"question": "a"}\n')
        measure("fidelity", data=str(path), offset=1)


def test_tuning_below_every_minimum_is_refused(measure: Any) -> None:
    with pytest.raises(UserError, match=r"target_ratio = 0.3 is below what half of 8 layers"):
        measure("tune", target_ratio=0.3)
