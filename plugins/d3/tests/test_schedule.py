"""Schedules: the formula, nesting, budgets, bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
from graftwork import UserError
from graftwork_d3 import DepthSchedule
from graftwork_d3.policies import (
    SkipTable,
    constant,
    early_exit,
    even,
    late_start,
    random_order,
    reversed_steps,
)
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def schedules(draw: st.DrawFn) -> DepthSchedule:
    layers = draw(st.integers(2, 48))
    start = draw(st.integers(1, layers - 1))
    tail = draw(st.integers(1, layers - start))
    minimum = draw(st.integers(start + tail, layers))
    flexible = list(range(start, layers - tail))
    order: Any = draw(st.sampled_from(["from_start", "from_end", "spread", "list"]))
    if order == "list":
        order = tuple(draw(st.permutations(flexible)))
    alpha = draw(st.floats(0.5, 1.0))
    levels = draw(st.none() | st.integers(2, 9))
    return DepthSchedule(layers, alpha, start, tail, minimum, order, levels)


@given(schedules())
def test_invariants(schedule: DepthSchedule) -> None:
    """Depths never rise, sets are nested, head and tail stay, and there are n_t layers at step t."""
    layers = set(range(schedule.layers))
    assert schedule.depth(0) == schedule.layers
    assert schedule.skipped(0) == frozenset()
    before: frozenset[int] = frozenset()
    for step in range(1, 80):
        gone, depth = schedule.skipped(step), schedule.depth(step)
        assert before <= gone <= schedule.removable
        assert len(layers - gone) == depth
        assert schedule.minimum <= depth <= schedule.depth(step - 1)
        assert not gone & {*range(schedule.start), *range(schedule.layers - schedule.tail, schedule.layers)}
        if schedule.levels is None:
            exact = math.floor(schedule.layers * schedule.alpha**step + 1e-9)
            assert depth == min(schedule.layers, max(schedule.minimum, exact))
        else:
            assert depth in schedule.depths
        before = gone
    total = sum(schedule.depth(step) for step in range(1, 80))
    assert schedule.mean_ratio(79) == pytest.approx(total / (79 * schedule.layers), rel=1e-12)
    assert DepthSchedule.from_json(schedule.as_json()) == schedule
    assert hash(DepthSchedule.from_json(schedule.as_json())) == hash(schedule)


def test_by_hand() -> None:
    schedule = DepthSchedule(10, 0.9, 3, 2, 5)
    # 10 * 0.9^t = 9, 8.1, 7.29, 6.561, 5.9049, 5.31441, 4.78...
    assert [schedule.depth(step) for step in range(9)] == [10, 9, 8, 7, 6, 5, 5, 5, 5]
    assert schedule.skipped(3) == {3, 4, 5}
    assert DepthSchedule(10, 0.9, 3, 2, 5, "from_end").skipped(3) == {7, 6, 5}
    assert DepthSchedule(10, 0.9, 3, 2, 5, (7, 3, 5, 4, 6)).skipped(3) == {7, 3, 5}


def test_a_product_that_is_whole_is_not_rounded_down() -> None:
    # 100 * 0.9 * 0.9 is 81.00000000000001 or 80.99999999999999, depending on how it is computed.
    schedule = DepthSchedule(30, 0.7, 1, 1, 2)
    assert schedule.depth(1) == 21
    assert 30 * 0.7 < 21 + 1e-12


def test_spread_layers_lie_apart() -> None:
    schedule = DepthSchedule(20, 0.5, 2, 2, 4, "spread")
    # Between the layers 1 and 18 the middle is farthest from both; then the middles of what is left.
    assert schedule.leaving[:3] == (9, 5, 13)
    assert sorted(schedule.leaving) == list(range(2, 18))


def test_levels_are_few_and_reach_both_ends() -> None:
    plain = DepthSchedule(30, 0.97, 8, 2, 15)
    schedule = DepthSchedule(30, 0.97, 8, 2, 15, levels=4)
    assert schedule.depths == (30, 25, 20, 15)
    assert {schedule.depth(step) for step in range(200)} == {30, 25, 20, 15}
    assert all(abs(schedule.depth(step) - plain.depth(step)) <= 2.5 for step in range(200))


@given(
    st.integers(4, 48),
    st.integers(1, 300),
    st.floats(0, 1),
    st.sampled_from(["from_start", "spread"]),
)
@settings(deadline=None, max_examples=40)
def test_the_solver_meets_the_budget_within_a_layer(
    layers: int, steps: int, place: float, order: Any
) -> None:
    """Invariant 9: mean(n)/L within 1/L of the target."""
    base = DepthSchedule.of(layers, alpha=1.0, order=order)
    lowest = base.minimum / layers
    target = lowest + place * (1 - lowest)
    schedule = DepthSchedule.of(layers, target_ratio=target, expected_tokens=steps, order=order)
    mean = sum(schedule.depth(step) for step in range(1, steps + 1)) / (layers * steps)
    assert abs(mean - target) <= 1 / layers


def test_a_budget_over_texts_of_different_length() -> None:
    # Three texts of 10, 20 and 40 steps: step t counts for those that get there.
    alive = [3.0] * 10 + [2.0] * 10 + [1.0] * 20
    schedule = DepthSchedule.of(30, target_ratio=0.8, expected_tokens=alive)
    total = sum(schedule.depth(step) for size in (10, 20, 40) for step in range(1, size + 1))
    assert total / (70 * 30) == pytest.approx(0.8, abs=1 / 70)


def test_the_issue_s_example() -> None:
    schedule = DepthSchedule.of(32, target_ratio=0.667, expected_tokens=200)
    assert schedule.alpha == pytest.approx(0.996, abs=5e-4)
    assert DepthSchedule.of(32, target_ratio=1.0).alpha == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"alpha": 0.0}, r"alpha = 0.0 is not in \(0, 1\]"),
        ({"alpha": 1.1}, r"alpha = 1.1 is not in \(0, 1\]"),
        ({"start": 0}, "flex start 0 and tail 2 do not fit a model of 10 layers"),
        ({"tail": 0}, "flex start 3 and tail 0 do not fit a model of 10 layers"),
        ({"start": 9}, "flex start 9 and tail 2 do not fit a model of 10 layers.*together at most 10"),
        ({"minimum": 4}, "minimum = 4 layers is not between flex start . tail = 5 and the model's 10"),
        ({"minimum": 11}, "minimum = 11 layers is not between"),
        ({"levels": 1}, "levels = 1; two depths are the fewest"),
        ({"order": "sideways"}, "order 'sideways' is none of from_start"),
        (
            {"order": (3, 4, 5, 6, 8)},
            "order names layer 8, which is not between the flex start 3 and the tail",
        ),
        ({"order": (3, 4, 5, 3, 6)}, "order names layer 3 twice"),
        ({"order": (3, 4)}, "order names 2 layers, but down to a minimum of 5 layers 5 leave"),
    ],
)
def test_bad_values(change: dict[str, Any], problem: str) -> None:
    good: dict[str, Any] = {"layers": 10, "alpha": 0.9, "start": 3, "tail": 2, "minimum": 5}
    with pytest.raises(UserError, match=problem):
        DepthSchedule(**{**good, **change})


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            {"target_ratio": 0.4},
            r"target_ratio = 0.4 is not between 0.5 \(the minimum of 15 of 30 layers\) and 1",
        ),
        ({"target_ratio": 1.2}, "target_ratio = 1.2 is not between"),
        ({"target_ratio": 0.8, "expected_tokens": 0}, "at least one expected token"),
        ({}, "alpha .* or target_ratio"),
        ({"alpha": 0.9, "target_ratio": 0.9}, "alpha .* or target_ratio"),
    ],
)
def test_bad_budgets(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        DepthSchedule.of(30, **given)


def test_what_is_compared_with_has_the_same_depth() -> None:
    schedule = DepthSchedule(10, 0.95, 3, 2, 5)
    steps = 20
    depths = [schedule.depth(step) for step in range(1, steps + 1)]
    others = {
        "early": early_exit(schedule, steps),
        "late": late_start(schedule, steps),
        "even": even(schedule, steps),
        "random": random_order(schedule, steps, 0),
    }
    for name, table in others.items():
        assert [10 - len(table.skipped(step)) for step in range(1, steps + 1)] == depths, name
        assert table.nested is (name != "even"), name
        assert 0 not in table.removable, name
    assert others["early"].skipped(2) == {9}
    assert others["late"].skipped(2) == {1}
    assert others["random"] == random_order(schedule, steps, 0)
    assert others["random"] != random_order(schedule, steps, 1)
    assert not others["random"].removable & {8, 9}
    back = reversed_steps(schedule, steps)
    assert [10 - len(back.skipped(step)) for step in range(1, steps + 1)] == depths[::-1]
    assert not back.nested
    flat = constant(schedule, steps, 7)
    assert {flat.skipped(step) for step in range(1, 50)} == {frozenset({3, 4, 5})}
    assert flat.skipped(0) == frozenset()
    assert even(DepthSchedule(9, 0.01, 1, 1, 5), 2).skipped(1) == {1, 3, 5, 7}


def test_a_table_says_whether_a_layer_comes_back() -> None:
    assert SkipTable(4, (frozenset({1}), frozenset({1, 2}))).nested
    assert not SkipTable(4, (frozenset({1}), frozenset({2}))).nested
    assert SkipTable(4, ()).skipped(3) == frozenset()
