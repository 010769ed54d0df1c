"""Low rank: the predicted error is the measured one, and nothing of that rank does better."""

import pytest
import torch
from graftwork import UserError
from graftwork.transform.lowrank import rank_for, truncated, whitener
from hypothesis import given, settings
from hypothesis import strategies as st


def draw(seed, rows=10, columns=14, tokens=100, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype), x


def measured(x, weight, u, s, v):
    return (x @ (weight - (u * s) @ v).T).square().sum()


@settings(max_examples=40, deadline=None)
@given(
    ratio=st.floats(0.4, 1),
    rows=st.integers(4, 5000),
    columns=st.integers(12, 5000),
)
def test_the_rank_is_the_largest_whose_factors_fit(ratio, rows, columns):
    rank = rank_for(ratio, rows, columns)
    assert rank * (rows + columns) <= ratio * rows * columns * (1 + 1e-12)
    assert (rank + 1) * (rows + columns) > ratio * rows * columns * (1 - 1e-12)


def test_ranks_of_known_shapes():
    assert rank_for(0.8, 4096, 4096) == 1638
    assert rank_for(1.0, 576, 192) == 144
    assert rank_for(100, 8, 4) == 4
    with pytest.raises(
        UserError, match=r"ratio 0.1 leaves 'a.b' \(8 x 4\) a rank of 0; the ratio must be 0.375 or"
    ):
        rank_for(0.1, 8, 4, "a.b")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 10))
def test_the_error_of_outputs_is_what_was_cut_off(seed, rank):
    weight, x = draw(seed)
    lower = whitener(x.T @ x)
    cut = torch.linalg.svdvals(weight @ lower)[rank:].square().sum()
    u, s, v = truncated(weight, rank, lower)
    assert (u.shape, s.shape, v.shape) == ((10, rank), (rank,), (rank, 14))
    torch.testing.assert_close(measured(x, weight, u, s, v), cut, rtol=1e-6, atol=1e-8)
    # The same through the symmetric root, which is how the optimum is usually written.
    values, vectors = torch.linalg.eigh(x.T @ x)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    a, b, c = torch.linalg.svd(weight @ root, full_matrices=False)
    expected = (a[:, :rank] * b[:rank]) @ c[:rank] @ torch.linalg.inv(root)
    torch.testing.assert_close((u * s) @ v, expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 9))
def test_no_matrix_of_that_rank_does_better(seed, rank):
    weight, x = draw(seed)
    u, s, v = truncated(weight, rank, whitener(x.T @ x))
    least = measured(x, weight, u, s, v)
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1e-1, 1):
        a = u * s + size * torch.randn(u.shape, generator=generator, dtype=torch.float64)
        # Best right factor for these columns: least squares.
        b = torch.linalg.lstsq(a, weight).solution
        assert (x @ (weight - a @ b).T).square().sum() >= least * (1 - 1e-9)
        b = v + size * torch.randn(v.shape, generator=generator, dtype=torch.float64)
        assert (x @ (weight - (u * s) @ b).T).square().sum() >= least * (1 - 1e-9)
    plain = truncated(weight, rank)
    assert measured(x, weight, *plain) >= least * (1 - 1e-9)


def test_without_a_whitener_it_is_the_plain_decomposition():
    weight, _ = draw(0)
    u, s, v = truncated(weight, 4)
    torch.testing.assert_close(s, torch.linalg.svdvals(weight)[:4])
    torch.testing.assert_close(u.T @ u, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(v @ v.T, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(
        (weight - (u * s) @ v).square().sum(), torch.linalg.svdvals(weight)[4:].square().sum()
    )


def test_scales_of_inputs_are_a_diagonal_whitener():
    weight, _ = draw(1)
    scales = torch.linspace(0.1, 3, 14, dtype=torch.float64)
    for ours, theirs in zip(
        truncated(weight, 5, scales), truncated(weight, 5, torch.diag(scales)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whitened", [True, False])
def test_full_rank_gives_the_weight_back(dtype, whitened):
    weight, x = draw(2, dtype=dtype)
    u, s, v = truncated(weight, 10, whitener(x.T @ x) if whitened else None)
    assert u.dtype == s.dtype == v.dtype == torch.float64
    torch.testing.assert_close((u * s) @ v, weight.double(), rtol=1e-8, atol=1e-8)


def test_the_whitener_is_the_cholesky_factor_of_the_damped_moments():
    _, x = draw(3)
    moments = x.T @ x
    for damp in (0.0, 0.01):
        lower = whitener(moments, damp=damp)
        expected = moments + damp * moments.diagonal().mean() * torch.eye(14, dtype=torch.float64)
        torch.testing.assert_close(lower @ lower.T, expected)
        assert torch.equal(lower, lower.tril())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_fewer_tokens_than_inputs_are_mended(scale):
    weight, x = draw(4, tokens=5)
    x = x * scale
    moments = x.T @ x
    lower = whitener(moments)
    assert torch.isfinite(lower).all()
    added = (lower @ lower.T - moments).diagonal()
    assert (added > 0).all()
    assert (added < 1e-5 * moments.diagonal().mean()).all()
    u, s, v = truncated(weight, 5, lower)
    # Inputs span five dimensions: rank five serves them all.
    assert measured(x, weight, u, s, v) < 1e-5 * (x @ weight.T).square().sum()


def test_bad_numbers_are_refused_by_name():
    weight, x = draw(5)
    moments = x.T @ x
    broken = moments.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"moments of the inputs of 'a.b' hold NaN"):
        whitener(broken, name="a.b")
    with pytest.raises(UserError, match=r"'a.b' cannot be factorised: their smallest eigenvalue is -"):
        whitener(moments - 2 * moments.diagonal().mean() * torch.eye(14), name="a.b")
    with pytest.raises(
        UserError, match=r"'a.b' cannot be factorised: their smallest eigenvalue is 0 at a mean"
    ):
        whitener(torch.zeros(4, 4), name="a.b")
    weight[1, 1] = torch.inf
    with pytest.raises(UserError, match=r"weight 'a.b' holds 1 values"):
        truncated(weight, 3, name="a.b")
    with pytest.raises(ValueError, match="rank 11 of a weight"):
        truncated(draw(0)[0], 11)
