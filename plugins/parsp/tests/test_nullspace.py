"""Equation (3): the protected directions, whole and from a sketch, in float64."""

from __future__ import annotations

import pytest
import torch
from graftwork_kernels.region_update import fold_rows
from graftwork_parsp.nullspace import Basis, Sketch, top_directions
from hypothesis import given, settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**31)


def draw(seed: int, rows: int, width: int, *, decay: float = 0.8) -> torch.Tensor:
    """Return rows x width with a spectrum that falls, turned at random, in float64."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    scales = decay ** torch.arange(width, dtype=torch.float64)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) * scales @ turn


def dense(basis: Basis) -> torch.Tensor:
    """Return P (d x d)."""
    return fold_rows(torch.eye(basis.width).double(), basis.matrix.double(), basis.complement)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(2, 24), st.floats(0, 0.99), st.floats(0.3, 1.0))
def test_the_smallest_k_that_leaves_eps_of_the_energy(
    seed: int, width: int, eps: float, decay: float
) -> None:
    x = draw(seed, 3 * width, width, decay=decay)
    moment = x.T @ x
    basis = top_directions(moment, eps)
    p = dense(basis)
    energies = torch.linalg.eigvalsh(moment).flip(0)
    total = energies.sum()
    # tr(P K P) <= eps tr K, and one direction less would break it.
    assert torch.trace(p @ moment @ p) <= (eps + 1e-6) * total
    if basis.k:
        assert energies[basis.k - 1 :].sum() > (eps - 1e-9) * total
    assert basis.complement == (2 * basis.k > width)
    assert basis.matrix.shape == (width, width - basis.k if basis.complement else basis.k)
    assert basis.matrix.dtype == torch.float32
    torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-6)
    torch.testing.assert_close(p, p.T, rtol=0, atol=1e-7)
    assert torch.trace(p).item() == pytest.approx(width - basis.k, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_k_falls_as_eps_grows(seed: int) -> None:
    x = draw(seed, 40, 16)
    ks = [top_directions(x.T @ x, eps).k for eps in (0.0, 0.001, 0.01, 0.1, 0.5, 0.9)]
    assert ks == sorted(ks, reverse=True)
    assert ks[0] == 16


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from([0.01, 0.1, 0.3]))
def test_a_further_task_keeps_what_the_earlier_one_is_promised(seed: int, eps: float) -> None:
    """tr(P_{t+1} K_t P_{t+1}) <= eps tr K_{t+1}, since K_t is a part of K_{t+1}."""
    first, second = draw(seed, 40, 12), draw(seed + 1, 40, 12)
    k_t = first.T @ first / 40
    k_next = k_t + second.T @ second / 40
    p = dense(top_directions(k_next, eps))
    assert torch.trace(p @ k_t @ p) <= (eps + 1e-6) * torch.trace(k_next)


def test_eps_zero_protects_exactly_the_span() -> None:
    x = draw(0, 5, 16)
    basis = top_directions(x.T @ x, 0.0)
    assert basis.k == 5
    assert (dense(basis) @ x.T).abs().max() < 1e-6
    full = draw(0, 50, 16)
    nothing = top_directions(full.T @ full, 0.0)
    assert nothing.k == 16
    assert nothing.complement
    assert dense(nothing).abs().max() == 0


def test_without_a_past_nothing_is_protected() -> None:
    theta = torch.randn(3, 8)
    empty = Basis.empty(8)
    assert torch.equal(fold_rows(theta, empty.matrix, empty.complement), theta)
    assert top_directions(torch.zeros(8, 8), 0.1).k == 0


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 15))
def test_both_forms_of_the_projection_agree(seed: int, k: int) -> None:
    """Theta - (Theta U) U^T against (Theta V) V^T with the rest V of the eigenvectors."""
    x = draw(seed, 64, 16, decay=0.9)
    vectors = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)
    theta = torch.randn(4, 16, dtype=torch.float64)
    short, long = fold_rows(theta, vectors[:, :k], False), fold_rows(theta, vectors[:, k:], True)
    torch.testing.assert_close(short, long, rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 14))
def test_the_bound_on_what_earlier_inputs_see(seed: int, k: int) -> None:
    """Inequality (5): mean |dW x|^2 = tr(dW C dW^T) <= |Theta|_F^2 e_{k+1}."""
    x = draw(seed, 64, 16)
    moment = x.T @ x / 64
    energies = torch.linalg.eigvalsh(moment).flip(0)
    eps = (energies[k:].sum() / energies.sum()).item() * (1 + 1e-9)
    basis = top_directions(moment, eps)
    assert basis.k == k
    theta = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    change = fold_rows(theta, basis.matrix.double(), basis.complement)
    measured = (x @ change.T).square().sum(1).mean()
    bound = theta.square().sum() * energies[k]
    torch.testing.assert_close(measured, torch.trace(change @ moment @ change.T))
    assert measured <= bound * (1 + 1e-5)
    # Reached by a rank-one Theta along the eigenvector k + 1.
    vector = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, k]
    along = fold_rows(
        torch.outer(torch.arange(1.0, 6).double(), vector), basis.matrix.double(), basis.complement
    )
    reached = (x @ along.T).square().sum(1).mean()
    torch.testing.assert_close(reached, 55 * energies[k], rtol=1e-4, atol=1e-6 * energies[0].item())


# ---------------------------------------------------------------- sketch


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(2, 10), st.floats(0.6, 0.95))
def test_frequent_directions_keep_their_promise(seed: int, size: int, decay: float) -> None:
    """0 <= X^T X - S^T S <= (energy outside of the best r directions) / (l - r), for every r < l."""
    x = draw(seed, 100, 20, decay=decay)
    sketch = Sketch.empty(size, 20)
    for part in x.split(13):
        sketch.add(part)
    assert sketch.rows.shape == (size, 20)
    gap = x.T @ x - sketch.rows.double().T @ sketch.rows.double()
    values = torch.linalg.eigvalsh(gap)
    energies = torch.linalg.eigvalsh(x.T @ x).flip(0)
    assert values[0] >= -1e-5 * energies.sum()
    for r in range(size):
        assert values[-1] <= energies[r:].sum() / (size - r) + 1e-5 * energies.sum()
    torch.testing.assert_close(sketch.energy.double(), x.square().sum(0), rtol=1e-5, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([0.05, 0.2]))
def test_a_sketch_protects_what_it_says(seed: int, eps: float) -> None:
    x = draw(seed, 100, 20, decay=0.7)
    sketch = Sketch.empty(10, 20)
    sketch.add(x)
    basis, kept = sketch.directions(eps)
    p = dense(basis)
    outside = torch.trace(p @ (x.T @ x) @ p) / x.square().sum()
    assert kept
    assert outside <= eps + 1e-5
    assert basis.k < 10


def test_a_sketch_that_is_too_small_says_so() -> None:
    x = draw(0, 200, 20, decay=1.0)
    sketch = Sketch.empty(4, 20)
    sketch.add(x)
    basis, kept = sketch.directions(0.1)
    assert not kept
    assert basis.k <= 4


def test_a_sketch_of_full_size_is_the_moment() -> None:
    x = draw(1, 60, 12)
    sketch = Sketch.empty(50, 12)
    sketch.add(x[:20])
    other = Sketch.empty(50, 12)
    other.add(x[20:])
    sketch.merge(other)
    assert sketch.rows.shape == (12, 12)
    torch.testing.assert_close(
        sketch.rows.double().T @ sketch.rows.double(), x.T @ x, rtol=1e-4, atol=1e-5 * x.square().sum().item()
    )
    half = sketch.scaled(0.5)
    torch.testing.assert_close(half.rows.T @ half.rows * 2, sketch.rows.T @ sketch.rows)
    torch.testing.assert_close(half.energy * 2, sketch.energy)
    for eps in (0.01, 0.1, 0.4):
        basis, kept = sketch.directions(eps)
        assert kept
        exact = top_directions(x.T @ x, eps)
        assert basis.k == exact.k
        torch.testing.assert_close(dense(basis), dense(exact), rtol=0, atol=1e-3)


def test_a_block_of_a_sketch_is_that_of_the_columns() -> None:
    x = draw(2, 80, 16, decay=0.7)
    columns = torch.tensor([1, 4, 5, 11])
    sketch = Sketch.empty(16, 16)
    sketch.add(x)
    basis, kept = sketch.directions(0.05, columns)
    block = x[:, columns]
    exact = top_directions(block.T @ block, 0.05)
    assert kept
    assert basis.k == exact.k
    torch.testing.assert_close(dense(basis), dense(exact), rtol=0, atol=1e-3)
