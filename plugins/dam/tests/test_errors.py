"""Errors of one compression and of two: the bounds that always hold, and what is not guaranteed."""

from __future__ import annotations

import pytest
import torch
from graftwork.transform.quantizer import quantize_weight
from graftwork.transform.scheme import WeightScheme
from graftwork_dam import (
    dot_norm,
    factor_errors,
    factorise,
    gaps,
    low_rank_first_bound,
    rounded_first_bound,
    tensor_norm,
)
from hypothesis import given, settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**31)
BITS = st.sampled_from([2, 3, 4, 8])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return quantize_weight(weight, WeightScheme(bits=bits)).dequantized()


@given(SEEDS, BITS, st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_the_bounds_hold_in_both_orders(seed: int, bits: int, rank: int) -> None:
    weight = draw(8, 10, seed=seed)
    low = factorise(weight, rank).product()
    assert (
        tensor_norm(weight - rounded(low, bits))
        <= low_rank_first_bound(weight, low, rounded(low, bits)) + 1e-9
    )
    first = rounded(weight, bits)
    then = factorise(first, rank).product()
    assert tensor_norm(weight - then) <= rounded_first_bound(weight, first, rank) + 1e-9


def test_the_second_bound_is_that_of_its_formula() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    # E has norm 0.1; what rank 1 leaves is sqrt(4 + 1).
    off = weight.clone()
    off[0, 1] = 0.1
    assert rounded_first_bound(weight, off, 1) == pytest.approx(2 * 0.1 + 5**0.5)


def test_a_low_rank_weight_may_have_larger_entries_and_round_worse() -> None:
    """Why the second part of the first bound is no error of ``Q(W)``: the range of a row can grow."""
    pattern, other = torch.tensor([[3.0, 1, 1, 1]]).double(), torch.tensor([[-1.0, 1, 1, 1]]).double()
    kept = torch.cat([pattern, pattern])
    weight = kept + 0.9 * torch.cat([other, -other])
    low = factorise(weight, 1).product()
    torch.testing.assert_close(low, kept)
    assert weight[0].abs().max() == pytest.approx(2.1)
    assert low[0].abs().max() == pytest.approx(3.0)
    assert tensor_norm(low - rounded(low, 4)) > 1.4 * tensor_norm(weight - rounded(weight, 4))


@given(SEEDS, BITS)
@settings(max_examples=40, deadline=None)
def test_errors_of_factors_are_amplified_by_the_other(seed: int, bits: int) -> None:
    left, right = draw(6, 3, seed=seed), draw(3, 8, seed=seed + 1)
    parts = factor_errors(left, right, rounded(left, bits), rounded(right, bits))
    torch.testing.assert_close(sum(parts), rounded(left, bits) @ rounded(right, bits) - left @ right)
    torch.testing.assert_close(parts[0], (rounded(left, bits) - left) @ right)
    torch.testing.assert_close(parts[1], left @ (rounded(right, bits) - right))


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_the_output_norm_is_that_over_all_tokens(seed: int) -> None:
    error, x = draw(5, 7, seed=seed), draw(40, 7, seed=seed + 1)
    assert dot_norm(error, x.T @ x) == pytest.approx(float((x @ error.T).norm()), rel=1e-10)


def test_gaps_are_what_is_beyond_both_parts() -> None:
    weight = 2 * torch.eye(4, dtype=torch.float64)
    first, second, joint = weight.clone(), weight.clone(), weight.clone()
    first[0, 0] += 1.0
    second[1, 1] += 2.0
    joint[2, 2] += 5.0
    x = torch.diag(torch.tensor([1.0, 3.0, 2.0, 0.0], dtype=torch.float64))
    found = gaps(weight, joint, first, second, x.T @ x)
    # ||W|| = 4 and ||X W^T|| = 2 sqrt(14); on outputs the errors count 1, 6 and 10.
    assert found.tensor == pytest.approx((5 - (1 + 2)) / 4)
    assert found.dot == pytest.approx((10 - (1 + 6)) / (2 * 14**0.5))
    assert gaps(weight, joint, first, second).dot is None
    zeros = torch.zeros(2, 2)
    assert gaps(zeros, zeros, zeros, zeros).tensor == 0
