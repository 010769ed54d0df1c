"""Flatness and errors, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from graftwork.transform.figures import flatness, relative_error, watching
from torch import nn


def test_flatness_is_nought_where_all_are_equal_and_one_for_a_single_entry() -> None:
    assert flatness(torch.full((8, 4), -3.0)) == pytest.approx(0, abs=1e-12)
    single = torch.zeros(8, 4)
    single[2, 1] = 5
    assert flatness(single) == pytest.approx(1)
    assert flatness(torch.zeros(8, 4)) == 0


def test_flatness_is_the_formula_and_knows_no_scale_sign_or_order() -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = (x.square() / x.square().sum()).flatten()
    expected = 1 + float((p * p.log()).sum()) / math.log(30)
    assert flatness(x) == pytest.approx(expected, rel=1e-6)
    assert flatness(-7 * x.flatten()[torch.randperm(30)]) == pytest.approx(expected, rel=1e-6)


def test_relative_error_is_of_squares() -> None:
    a = torch.tensor([3.0, 4.0])
    assert relative_error(a, torch.tensor([3.0, 3.0])) == pytest.approx(1 / 25)


def test_watching_sees_the_first_call_only() -> None:
    layer = nn.Sequential(nn.Linear(4, 4))
    first, second = torch.tensor([[1.0, 0, 0, 0]]), torch.ones(1, 4)
    with watching(layer) as seen:
        layer(first)
        layer(second)
    layer(second)
    assert seen == {"0": pytest.approx(1.0)}
