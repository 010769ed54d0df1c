"""Flatness against its formula, its bounds, and the scales that are claimed to be the best."""

from __future__ import annotations

import math

import pytest
import torch
from graftwork_bdq.flatness import concentration, flatness, flattest, row_update
from hypothesis import given, settings
from hypothesis import strategies as st


def matrix(seed: int, rows: int = 6, columns: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return normal * torch.randn(rows, 1, generator=generator, dtype=torch.float64).exp()


def by_hand(weight: torch.Tensor) -> float:
    energy = [value**2 for value in weight.flatten().tolist()]
    shares = [value / math.fsum(energy) for value in energy]
    return math.fsum(p * math.log(p) for p in shares if p > 0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999))
def test_it_is_the_formula_and_lies_in_its_bounds(seed: int) -> None:
    weight = matrix(seed)
    found = flatness(weight).item()
    assert found == pytest.approx(by_hand(weight), abs=1e-12)
    assert -math.log(weight.numel()) <= found <= 0
    assert concentration(weight).item() == pytest.approx(1 + found / math.log(30), abs=1e-12)


def test_the_bounds_are_reached() -> None:
    signs = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]]) * 0.3
    assert flatness(signs).item() == pytest.approx(-math.log(6), abs=1e-12)
    assert concentration(signs).item() == pytest.approx(0, abs=1e-12)
    single = torch.zeros(3, 4)
    single[1, 2] = -7
    assert flatness(single).item() == 0
    assert concentration(single).item() == 1


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(1e-18, 1e18))
def test_size_sign_and_order_do_not_matter(seed: int, size: float) -> None:
    weight = matrix(seed)
    generator = torch.Generator().manual_seed(seed)
    shuffled = weight.flatten()[torch.randperm(weight.numel(), generator=generator)]
    signs = torch.randint(0, 2, shuffled.shape, generator=generator) * 2 - 1
    torch.testing.assert_close(flatness(shuffled * signs * size), flatness(weight), atol=1e-10, rtol=0)


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.tensor([[1.0, math.nan]]), torch.empty(0, 3)])
def test_what_has_no_energy_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="finite entries, not all of them zero"):
        flatness(bad)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999))
def test_a_turn_reaches_the_least_value_for_these_columns(seed: int) -> None:
    weight = matrix(seed)
    energy = weight.square()
    inside = energy / energy.sum(1, keepdim=True)
    entropies = -(inside * inside.log()).sum(1)
    best = -entropies.logsumexp(0)
    turned = weight * row_update(weight)[:, None]
    torch.testing.assert_close(flatness(turned), best, atol=1e-12, rtol=0)
    # Shares of energy ~ exp(H).
    shares = turned.square().sum(1) / turned.square().sum()
    torch.testing.assert_close(shares, entropies.softmax(0))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(50):
        other = torch.randn(len(weight), generator=generator, dtype=torch.float64).exp()
        assert flatness(weight * other[:, None]) >= best - 1e-12


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_no_turn_raises_it(seed: int) -> None:
    weight, before = matrix(seed), math.inf
    for turn in range(12):
        axis = weight if turn % 2 == 0 else weight.T
        scaled = axis * row_update(axis)[:, None]
        weight = scaled if turn % 2 == 0 else scaled.T
        now = flatness(weight).item()
        assert now <= before + 1e-12
        before = now


def test_balancing_rows_and_columns_is_not_the_optimum() -> None:
    weight = matrix(3, 30, 20)
    balanced = weight
    for _ in range(500):
        balanced = balanced / balanced.square().mean(1, keepdim=True).sqrt()
        balanced = balanced / balanced.square().mean(0).sqrt()
    rows, columns = flattest(weight)
    best = flatness(rows[:, None] * weight * columns)
    assert -math.log(600) < best < flatness(balanced) - 1e-3
    assert flatness(balanced) < flatness(weight)


def test_rows_of_zeros_stay_as_they_are() -> None:
    weight = matrix(1)
    weight[2] = 0
    rows, columns = flattest(weight)
    assert rows[2] == 1
    assert bool(torch.isfinite(rows).all() and torch.isfinite(columns).all())
    assert flatness(rows[:, None] * weight * columns) < flatness(weight)
