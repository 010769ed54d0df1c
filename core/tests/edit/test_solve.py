"""The closed form against plain float64 algebra."""

from __future__ import annotations

import math

import pytest
import torch
from graftwork.edit.errors import StatsError
from graftwork.edit.solve import factorise, rank_one, solve_update
from hypothesis import given, settings
from hypothesis import strategies as st


def problem(seed: int, h: int, d: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(4 * d, d) * torch.logspace(0, -2, d, dtype=torch.float64)
    return draw(h, n), draw(d, n), x.T @ x / len(x)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.integers(2, 9),
    st.integers(1, 14),
    st.sampled_from([0.1, 1.0, 100.0]),
)
def test_both_forms_are_the_formula(seed: int, h: int, d: int, n: int, lam: float) -> None:
    residuals, keys, moment = problem(seed, h, d, n)
    factor = factorise(moment, lam)
    found = solve_update(residuals, keys, factor)
    whole = lam * moment + factor.eps * torch.eye(d, dtype=torch.float64)
    wanted = residuals @ keys.T @ torch.linalg.inv(whole + keys @ keys.T)
    torch.testing.assert_close(found.dense(), wanted, rtol=1e-6, atol=1e-9)
    assert torch.linalg.matrix_rank(found.dense()) <= min(n, d, h)
    assert found.norm == pytest.approx(float(wanted.norm()), rel=1e-6)
    inner = (keys * (torch.linalg.inv(whole + keys @ keys.T) @ keys)).sum(0)
    torch.testing.assert_close(found.gain, inner, rtol=1e-6, atol=1e-9)


def test_one_edit_gets_the_predicted_share_of_its_residual() -> None:
    residuals, keys, moment = problem(1, 3, 8, 1)
    for lam in (0.5, 20.0):
        found = solve_update(residuals, keys, factorise(moment, lam, ridge=0.0))
        c = float((keys.T @ torch.linalg.solve(moment, keys)).item())
        torch.testing.assert_close(found.dense() @ keys, residuals * c / (lam + c), rtol=1e-8, atol=0)
        assert float(found.gain) == pytest.approx(c / (lam + c), rel=1e-8)


def test_a_small_weight_gives_the_rank_one_update() -> None:
    residuals, keys, moment = problem(2, 3, 8, 1)
    exact = rank_one(residuals[:, 0], keys[:, 0], factorise(moment, 1.0, ridge=0.0))
    torch.testing.assert_close(exact.dense() @ keys, residuals)
    near = solve_update(residuals, keys, factorise(moment, 1e-7, ridge=0.0))
    torch.testing.assert_close(near.dense(), exact.dense(), rtol=1e-5, atol=1e-8)


def test_a_protected_key_is_left_alone_as_the_weight_shrinks() -> None:
    residuals, keys, moment = problem(3, 3, 8, 4)
    residuals[:, 2:] = 0
    for lam, bound in ((1.0, 1.0), (1e-6, 1e-4)):
        made = solve_update(residuals, keys, factorise(moment, lam)).dense()
        assert float((made @ keys[:, 2:]).norm()) < bound * float(residuals.norm())


def test_the_order_of_edits_does_not_matter() -> None:
    residuals, keys, moment = problem(4, 3, 8, 5)
    factor = factorise(moment, 1.0)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(
        solve_update(residuals[:, order], keys[:, order], factor).dense(),
        solve_update(residuals, keys, factor).dense(),
        rtol=1e-9,
        atol=1e-12,
    )


def test_dead_inputs_need_the_ridge_and_are_counted_without_it() -> None:
    residuals, keys, moment = problem(5, 3, 8, 2)
    moment[6:] = 0
    moment[:, 6:] = 0
    assert torch.isfinite(solve_update(residuals, keys, factorise(moment, 1.0)).dense()).all()
    with pytest.raises(StatsError, match=r"'there': .*2 of 8 inputs are dead"):
        factorise(moment, 1.0, ridge=0.0, where="there")
    moment[0, 0] = math.nan
    with pytest.raises(StatsError, match="1 values that are no numbers"):
        factorise(moment, 1.0)
    with pytest.raises(StatsError, match="keys of an edit are no numbers"):
        solve_update(residuals, keys * math.inf, factorise(torch.eye(8), 1.0))
