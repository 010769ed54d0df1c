"""Metrics of the score matrix, and the paired bootstrap of their differences."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from graftwork.errors import UserError
from graftwork.evaluate import continual
from graftwork.evaluate.bootstrap import Interval, paired_bootstrap
from hypothesis import given
from hypothesis import strategies as st

SCORE = st.floats(0, 1)
MATRIX = st.integers(1, 5).flatmap(
    lambda tasks: st.lists(
        st.lists(SCORE, min_size=tasks, max_size=tasks), min_size=tasks + 1, max_size=tasks + 1
    )
)


def test_worked_example() -> None:
    matrix = [[0.2, 0.3, 0.1], [0.9, 0.4, 0.2], [0.7, 0.8, 0.3], [0.8, 0.6, 0.9]]
    found = continual.metrics(matrix)
    assert found["ap"] == pytest.approx((0.8 + 0.6 + 0.9) / 3)
    assert found["la"] == pytest.approx((0.9 + 0.8 + 0.9) / 3)
    assert found["bwt"] == pytest.approx((-0.1 - 0.2) / 2)
    assert found["forgetting"] == pytest.approx((0.1 + 0.2) / 2)
    assert found["fwt"] == pytest.approx(((0.4 - 0.3) + (0.3 - 0.1)) / 2)
    assert found["stage_average"] == pytest.approx((0.9 + 0.75 + 2.3 / 3) / 3)
    assert continual.gain_over_single(matrix, [0.8, 0.8, 0.8]) == pytest.approx(0.2 / 3)
    assert continual.unseen([0.5, 0.3], [0.4, 0.5]) == pytest.approx(0.05)


def test_forgetting_counts_from_the_best_stage_before_the_last() -> None:
    matrix = [[0.0, 0.0, 0.0], [0.5, None, None], [0.9, 0.5, None], [0.6, 0.5, 0.5]]
    assert continual.forgetting(matrix) == pytest.approx((0.3 + 0.0) / 2)
    # Learning more at the very end is not forgetting: it is negative.
    assert continual.forgetting([[0, 0], [0.5, 0], [0.7, 1]]) == pytest.approx(-0.2)


def test_one_task_leaves_transfer_undefined() -> None:
    found = continual.metrics([[0.1], [0.6]])
    assert found["ap"] == found["la"] == found["stage_average"] == 0.6
    assert found["bwt"] is found["fwt"] is found["forgetting"] is None


@pytest.mark.parametrize("name", list(continual.METRICS))
def test_a_missing_cell_leaves_a_metric_undefined(name: str) -> None:
    matrix: list[list[Any]] = [[None] * 3 for _ in range(4)]
    assert continual.metrics(matrix)[name] is None


def test_final_row_alone_gives_average_performance() -> None:
    matrix = [[None, None], [None, None], [0.5, 0.7]]
    found = continual.metrics(matrix)
    assert found["ap"] == pytest.approx(0.6)
    assert found["la"] is None
    assert found["bwt"] is None


@given(MATRIX)
def test_bounds_and_relations(matrix: list[list[float]]) -> None:
    found = continual.metrics(matrix)
    for name in ("ap", "la", "stage_average"):
        assert -1e-9 <= found[name] <= 1 + 1e-9  # type: ignore[operator]
    if len(matrix) == 2:
        assert found["ap"] == found["la"]
        return
    assert found["forgetting"] >= -found["bwt"] - 1e-12  # type: ignore[operator]
    # Average performance is what was learned plus what became of it.
    tasks = len(matrix) - 1
    assert found["ap"] == pytest.approx(found["la"] + found["bwt"] * (tasks - 1) / tasks)  # type: ignore[operator]


@given(st.lists(SCORE, min_size=2, max_size=5))
def test_constant_columns_neither_transfer_nor_forget(row: list[float]) -> None:
    found = continual.metrics([row] * (len(row) + 1))
    assert found["bwt"] == found["forgetting"] == found["fwt"] == 0
    assert found["ap"] == found["la"]


@given(MATRIX, SCORE)
def test_differences_do_not_move_with_a_constant(matrix: list[list[float]], shift: float) -> None:
    moved = [[value + shift for value in row] for row in matrix]
    before, after = continual.metrics(matrix), continual.metrics(moved)
    for name in ("bwt", "forgetting", "fwt"):
        if before[name] is not None:
            assert after[name] == pytest.approx(before[name], abs=1e-9)
    assert after["ap"] == pytest.approx(before["ap"] + shift)  # type: ignore[operator]


# ---------------------------------------------------------------------- bootstrap


def items(rates: list[list[float]], size: int, seed: int) -> list[list[list[int]]]:
    generator = np.random.default_rng(seed)
    return [[(generator.random(size) < rate).astype(int).tolist() for rate in row] for row in rates]


LOW = [[0.2, 0.2], [0.8, 0.2], [0.4, 0.8]]
HIGH = [[0.2, 0.2], [0.8, 0.2], [0.75, 0.8]]


def test_a_clear_difference_holds_and_none_is_not_decided() -> None:
    pairs = [(items(HIGH, 150, s), items(LOW, 150, s + 50)) for s in range(3)]
    for metric in ("ap", "bwt", "forgetting"):
        found = paired_bootstrap(pairs, metric)
        assert found.low < found.difference < found.high
        relation = "<" if metric == "forgetting" else ">"
        assert found.verdict(relation) == "held"
        assert found.verdict(">" if relation == "<" else "<") == "refuted"
    same = [(items(LOW, 150, s), items(LOW, 150, s + 50)) for s in range(3)]
    assert paired_bootstrap(same, "ap").verdict(">") == "not decided"


def test_difference_is_that_of_the_metric() -> None:
    a, b = items(HIGH, 40, 1), items(LOW, 40, 2)

    def value(side: Any, name: str) -> float:
        return continual.metrics([[float(np.mean(cell)) for cell in row] for row in side])[name]  # type: ignore[return-value]

    for name in continual.METRICS:
        assert paired_bootstrap([(a, b)], name).difference == pytest.approx(value(a, name) - value(b, name))


def test_own_metric_seed_and_identical_arms() -> None:
    a, b = items(HIGH, 60, 1), items(LOW, 60, 2)
    first = paired_bootstrap([(a, b)], lambda matrix: matrix[-1][0])
    assert first.difference == pytest.approx(np.mean(a[-1][0]) - np.mean(b[-1][0]))
    assert paired_bootstrap([(a, b)], "ap") == paired_bootstrap([(a, b)], "ap")
    assert paired_bootstrap([(a, b)], "ap") != paired_bootstrap([(a, b)], "ap", seed=1)
    assert paired_bootstrap([(a, a)], "ap") == Interval(0, 0, 0)


def test_width_agrees_with_the_standard_error() -> None:
    a, b = [[[0]], items([[0.7]], 400, 1)[0]], [[[0]], items([[0.5]], 400, 2)[0]]
    a[0][0] = b[0][0] = [0] * 400
    found = paired_bootstrap([(a, b)], "ap", draws=4000)
    error = np.std(np.subtract(a[1][0], b[1][0])) / 20
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_more_seeds_on_one_test_set_do_not_make_it_larger() -> None:
    pair = (items(HIGH, 100, 1), items(LOW, 100, 2))
    one, many = paired_bootstrap([pair], "ap"), paired_bootstrap([pair] * 5, "ap")
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.1)


def test_orders_find_a_task_in_another_column() -> None:
    a, b = items(HIGH, 100, 1), items(LOW, 100, 2)
    swapped = tuple([row[::-1] for row in side] for side in (a, b))
    one = paired_bootstrap([(a, b)], "ap", orders=[["x", "y"]])
    named = paired_bootstrap([(a, b), swapped], "ap", orders=[["x", "y"], ["y", "x"]])
    assert named.high - named.low == pytest.approx(one.high - one.low, rel=0.1)


def test_verdicts_with_a_margin() -> None:
    found = Interval(0.05, 0.02, 0.08)
    assert [found.verdict(">", m) for m in (0.01, 0.05, 0.1)] == ["held", "not decided", "refuted"]
    assert [found.verdict("<=", m) for m in (0.01, 0.05, 0.1)] == ["refuted", "not decided", "held"]


def test_what_cannot_be_compared() -> None:
    a, b = items(HIGH, 20, 1), items(LOW, 20, 2)
    with pytest.raises(UserError, match=r"no metric 'apt' \(did you mean 'ap'\?\)|no metric 'apt'"):
        paired_bootstrap([(a, b)], "apt")
    with pytest.raises(UserError, match="scored on 19 and 20 items"):
        paired_bootstrap([(a, items(LOW, 19, 2))], "ap")
    with pytest.raises(UserError, match="2 and 1 tasks"):
        paired_bootstrap([(a, items([[0.1], [0.2]], 20, 2))], "ap")
    with pytest.raises(UserError, match="needs cells that were not scored"):
        paired_bootstrap([([[None], [[1]]], [[None], [[0]]])], "bwt")
    with pytest.raises(UserError, match="no two runs"):
        paired_bootstrap([], "ap")


def test_a_long_stream_is_fast() -> None:
    rates = [[0.5] * 15] * 16
    pairs = [(items(rates, 300, s), items(rates, 300, s + 9)) for s in range(3)]
    started = time.perf_counter()
    paired_bootstrap(pairs, "forgetting")
    assert time.perf_counter() - started < 10
