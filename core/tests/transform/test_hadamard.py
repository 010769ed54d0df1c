"""Hadamard matrices are orthonormal with entries of one size, and the fast product is the product."""

import pytest
import torch
from graftwork.transform.hadamard import (
    hadamard,
    hadamard_matrix,
    hadamard_transposed,
    has_hadamard,
    random_signs,
    rotation_block,
)
from hypothesis import given, settings
from hypothesis import strategies as st

ORDERS = [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 52, 60, 64, 76, 100, 108, 140, 144, 148, 344, 576]


@pytest.mark.parametrize("n", ORDERS)
def test_a_matrix_is_orthonormal_and_all_entries_have_one_size(n):
    matrix = hadamard_matrix(n)
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        matrix.abs(), torch.full((n, n), n**-0.5, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_every_order_that_is_claimed_can_be_built():
    claimed = [n for n in range(1, 260) if has_hadamard(n)]
    for n in claimed:
        signs = (hadamard_matrix(n) * n**0.5).round()
        assert torch.equal(signs @ signs.T, n * torch.eye(n, dtype=torch.float64)), n
    # Of the multiples of four, these are known to need other constructions.
    missing = [n for n in range(4, 260, 4) if n not in claimed]
    assert missing == [92, 116, 156, 172, 184, 188, 232, 236]


@pytest.mark.parametrize("n", [3, 6, 92, 172, 0, -4])
def test_orders_without_a_matrix_are_refused(n):
    assert not has_hadamard(n)
    with pytest.raises(ValueError, match=f"order {n}"):
        hadamard_matrix(n)


@pytest.mark.parametrize(
    ("d", "block"),
    # Widths of common models are turned whole.
    [(576, 576), (1536, 1536), (4096, 4096), (11008, 11008), (14336, 14336), (8960, 8960), (9728, 9728),
     (18944, 18944), (7, 1), (6, 2), (92, 4), (172, 4), (2 * 3 * 64, 384), (5 * 7 * 16, 560)],
)  # fmt: skip
def test_the_block_is_the_largest_that_divides(d, block):
    assert rotation_block(d) == block
    assert d % block == 0
    assert not any(has_hadamard(k) for k in range(block + 1, d + 1) if d % k == 0)


@settings(max_examples=60, deadline=None)
@given(
    block=st.sampled_from([1, 2, 4, 12, 16, 20, 28, 36, 48, 64, 96, 128, 144, 256, 576]),
    blocks=st.integers(1, 3),
    leading=st.sampled_from([(), (1,), (3,), (2, 5), (0,)]),
    seed=st.integers(0, 1000),
)
def test_the_product_is_that_of_the_block_diagonal_matrix(block, blocks, leading, seed):
    x = torch.randn(
        *leading, block * blocks, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    matrix = torch.block_diag(*[hadamard_matrix(block)] * blocks)
    torch.testing.assert_close(hadamard(x, block), x @ matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_transposed(x, block), x @ matrix.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_transposed(hadamard(x, block), block), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [8192, 12 * 4096])
def test_large_blocks_keep_lengths_and_come_back(block):
    x = torch.randn(2, block, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = hadamard(x, block)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(hadamard_transposed(turned, block), x)
    # One spike is spread evenly.
    spike = torch.zeros(1, block, dtype=torch.float64)
    spike[0, 17] = 1
    torch.testing.assert_close(
        hadamard(spike, block).abs(), torch.full((1, block), block**-0.5, dtype=torch.float64)
    )


def test_products_keep_the_dtype_and_pass_gradients():
    for dtype in (torch.float32, torch.bfloat16):
        assert hadamard(torch.ones(2, 12, dtype=dtype), 12).dtype == dtype
    with torch.inference_mode():
        hadamard(torch.ones(2, 20, dtype=torch.float64), 20)
    x = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: hadamard(t, 20), (x,))
    assert torch.autograd.gradcheck(lambda t: hadamard_transposed(t, 40), (x,))


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="blocks of 8 do not make up 12"):
        hadamard(torch.ones(12), 8)


def test_signs_are_signs_and_follow_the_seed():
    signs = random_signs(1000, 3)
    assert signs.dtype == torch.int8
    assert torch.equal(signs.abs(), torch.ones(1000, dtype=torch.int8))
    assert abs(int(signs.sum())) < 150
    assert torch.equal(signs, random_signs(1000, 3))
    assert not torch.equal(signs, random_signs(1000, 4))
