"""The two factors: best of their rank in either metric, full rank, ranks, and what is refused."""

from __future__ import annotations

import pytest
import torch
from graftwork import UserError
from graftwork_dam import choose_rank, dot_norm, factorise, normalised, power_split
from graftwork_dam.factor import root
from hypothesis import given, settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**31)
SIZES = st.tuples(st.integers(2, 12), st.integers(2, 12))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uneven(tokens: int, columns: int, seed: int) -> torch.Tensor:
    """Inputs whose channels differ by orders of magnitude and depend on each other."""
    return (
        draw(tokens, columns, seed=seed)
        @ (draw(columns, columns, seed=seed + 1))
        * torch.logspace(-1, 1, columns, dtype=torch.float64)
    )


@given(SEEDS, SIZES, st.booleans())
@settings(max_examples=40, deadline=None)
def test_full_rank_gives_the_weight_back(seed: int, size: tuple[int, int], whitened: bool) -> None:
    rows, columns = size
    weight, x = draw(rows, columns, seed=seed), uneven(5 * columns, columns, seed + 1)
    factors = factorise(weight, min(size), moments=x.T @ x if whitened else None)
    if whitened and rows > columns:
        # U spans all that W has.
        torch.testing.assert_close(factors.product(), weight, rtol=1e-7, atol=1e-7)
    else:
        torch.testing.assert_close(factors.product(), weight, rtol=1e-9, atol=1e-9)


@given(SEEDS, SIZES)
@settings(max_examples=30, deadline=None)
def test_whitened_factors_are_those_of_svd_llm(seed: int, size: tuple[int, int]) -> None:
    rows, columns = size
    weight, x = draw(rows, columns, seed=seed), uneven(5 * columns, columns, seed + 1)
    rank = max(1, min(size) // 2)
    # SVD-LLM (W): S = chol(X^T X), SVD of W S, A = U Sigma^1/2, B = Sigma^1/2 V^T S^-1.
    s = torch.linalg.cholesky(x.T @ x)
    u, sigma, vt = torch.linalg.svd(weight @ s, full_matrices=False)
    root = sigma[:rank].sqrt()
    a, b = u[:, :rank] * root, root[:, None] * vt[:rank] @ torch.linalg.inv(s)
    factors = factorise(weight, rank, moments=x.T @ x)
    left, right = factors.split(power_split(factors.values, 0.5))
    torch.testing.assert_close(left.abs(), a.abs(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(right.abs(), b.abs(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(left @ right, a @ b, rtol=1e-5, atol=1e-8)
    # Normalising takes one factor out of both, and nothing else.
    other = factors.split(normalised(power_split(factors.values, 0.5)))
    torch.testing.assert_close(other[0] @ other[1], a @ b, rtol=1e-5, atol=1e-8)


@given(SEEDS, SIZES)
@settings(max_examples=30, deadline=None)
def test_the_error_is_that_of_the_values_cut_off(seed: int, size: tuple[int, int]) -> None:
    rows, columns = size
    weight, x = draw(rows, columns, seed=seed), uneven(5 * columns, columns, seed + 1)
    rank = max(1, min(size) - 1)
    s = torch.linalg.cholesky(x.T @ x)
    cut = torch.linalg.svdvals(weight @ s)[rank:].square().sum().sqrt()
    found = factorise(weight, rank, moments=x.T @ x).product()
    outputs = float((x @ (weight - found).T).norm())
    assert outputs == pytest.approx(float(cut), rel=1e-4, abs=1e-7)
    assert dot_norm(weight - found, x.T @ x) == pytest.approx(outputs, rel=1e-4, abs=1e-5)


def test_the_whitened_factors_beat_the_plain_ones_on_outputs_and_the_other_way_round() -> None:
    weight, x = draw(10, 12), uneven(100, 12, 1)
    white, plain = factorise(weight, 4, moments=x.T @ x).product(), factorise(weight, 4).product()
    assert (x @ (weight - white).T).norm() < 0.9 * (x @ (weight - plain).T).norm()
    assert (weight - plain).norm() < 0.9 * (weight - white).norm()


def test_a_smaller_rank_is_a_part_of_a_larger_one() -> None:
    weight, x = draw(10, 12), uneven(100, 12, 1)
    small, large = (factorise(weight, rank, moments=x.T @ x) for rank in (3, 7))
    torch.testing.assert_close(large.first(3).product(), small.product())


def test_fewer_tokens_than_the_rank_leave_the_outputs_right() -> None:
    weight, x = draw(10, 12), draw(3, 12, seed=1)
    factors = factorise(weight, 6, moments=x.T @ x)
    assert torch.isfinite(factors.product()).all()
    torch.testing.assert_close(x @ factors.product().T, x @ weight.T, rtol=1e-4, atol=1e-4)
    # An approximation that projects is never larger than what it projects.
    assert factors.product().norm() <= weight.norm() * (1 + 1e-12)


def test_moments_of_few_directions_and_float32_sums_are_good_enough() -> None:
    """As in the first layer of a model with a small vocabulary: as many different inputs as there are tokens in it."""
    table, weight = draw(5, 12) * 30, draw(10, 12, seed=1)
    x = table[torch.randint(5, (4000,), generator=torch.Generator().manual_seed(2))]
    moments = (x.float().T @ x.float()).double()
    assert torch.linalg.eigvalsh(moments)[0] < 0
    r = root(moments)
    torch.testing.assert_close(r @ r.T, moments, rtol=1e-6, atol=1.0)
    found = factorise(weight, 5, moments=moments).product()
    assert float((x @ (weight - found).T).norm() / (x @ weight.T).norm()) < 1e-3
    regular = x.T @ x + torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(root(regular), torch.linalg.cholesky(regular))


def test_ranks_follow_from_the_ratio() -> None:
    # floor(0.9 * 576 * 1536 / (576 + 1536))
    assert choose_rank(576, 1536, ratio=0.9, rank=None, group=None, name="w") == 377
    assert choose_rank(576, 1536, ratio=0.9, rank=None, group=64, name="w") == 320
    assert choose_rank(576, 1536, ratio=0.9, rank=100, group=None, name="w") == 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.01, "rank": None, "group": None}, r"ratio 0.01 leaves 'w' \(8 x 12\) a rank of 0"),
        ({"ratio": 0.9, "rank": None, "group": 8}, r"the rank 4, less than the group size 8"),
        ({"ratio": 0.9, "rank": 9, "group": None}, r"rank 9 is more than 'w' \(8 x 12\) has, which is 8"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        choose_rank(8, 12, name="w", **options)


def test_moments_that_are_none_are_refused_by_name() -> None:
    negative = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    with pytest.raises(UserError, match=r"'model.w' have an eigenvalue of -1 .*plugins.dam.damp"):
        factorise(draw(2, 3), 1, moments=negative, name="model.w")
    broken = draw(2, 3)
    broken[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"'model.w' holds 1 values that are no numbers"):
        factorise(broken, 1, name="model.w")
