"""Rotations are rotations, whatever was learned, and what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from graftwork import UserError
from graftwork_bdq.rotation import Cayley, cayley, fixed_rotation, random_orthogonal
from hypothesis import given, settings
from hypothesis import strategies as st


def matrix(rotation: object, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return rotation(torch.eye(size, dtype=dtype))  # type: ignore[operator]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(0.01, 30))
def test_cayley_is_orthogonal_and_its_formula(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    square = size * torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    skew = square - square.mT
    found = cayley(skew)
    identity = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(found, (identity - skew) @ torch.linalg.inv(identity + skew))
    assert (found @ found.mT - identity).abs().max() < 1e-9
    torch.testing.assert_close(torch.linalg.det(found), torch.ones(2, dtype=torch.float64))


def test_cayley_starts_at_the_identity_and_stays_orthogonal_over_steps() -> None:
    blocks = Cayley(32, 16)
    assert torch.equal(blocks(), torch.eye(16).expand(2, 16, 16))
    target = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(blocks.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        (blocks() - target).square().sum().backward()
        optimizer.step()
    found = blocks()
    assert (found @ found.mT - torch.eye(16)).abs().max() < 1e-5
    assert (found - torch.eye(16)).abs().max() > 0.1


@pytest.mark.parametrize("size", [16, 48, 64, 144, 576])
@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_rotations_are_orthogonal(size: int, kind: str) -> None:
    rotation = fixed_rotation(kind, size, 3, block=None, name="x")  # type: ignore[arg-type]
    found = matrix(rotation, size)
    assert (found @ found.T - torch.eye(size)).abs().max() < 1e-5
    again = fixed_rotation(kind, size, 3, block=None, name="x")  # type: ignore[arg-type]
    other = fixed_rotation(kind, size, 4, block=None, name="x")  # type: ignore[arg-type]
    assert torch.equal(matrix(again, size), found)
    assert not torch.equal(matrix(other, size), found)


def test_blocks_of_a_given_size() -> None:
    rotation = fixed_rotation("hadamard", 64, 0, block=16, name="x")
    found = matrix(rotation, 64)
    for block in range(4):
        row = found[16 * block]
        assert bool((row[16 * block : 16 * block + 16].abs() - 0.25).abs().max() < 1e-6)
        assert row.count_nonzero() == 16


def test_a_random_rotation_is_spread_over_all_of_them() -> None:
    """The mean entry of a uniform orthogonal matrix is 0, its variance 1/n; without the signs' repair it is not."""
    draws = torch.stack([random_orthogonal(4, seed) for seed in range(400)])
    assert draws.mean(0).abs().max() < 0.1
    assert (draws.square().mean(0) - 0.25).abs().max() < 0.06


def test_sizes_without_blocks_are_refused_with_the_cure() -> None:
    with pytest.raises(UserError, match=r"'mlp\.down_proj' has 26 inputs.*set plugins\.bdq\.rotation=random"):
        fixed_rotation("hadamard", 26, 0, block=None, name="mlp.down_proj")
    with pytest.raises(UserError, match="blocks of 10 do not divide its 64 inputs"):
        fixed_rotation("hadamard", 64, 0, block=10, name="x")
    with pytest.raises(UserError, match=r"learned blocks of 64 do not divide its 144 inputs.*learned_block"):
        Cayley(144, 64, "x")
