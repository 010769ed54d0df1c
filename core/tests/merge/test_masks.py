"""Bits: what is packed is unpacked, padding is zero, and the order of bits is the documented one."""

from __future__ import annotations

import pytest
import torch
from graftwork.merge.masks import pack, unpack
from hypothesis import given
from hypothesis import strategies as st


@given(rows=st.integers(1, 5), columns=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_round_trip(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(mask)
    assert packed.words.dtype == torch.int32
    assert packed.words.shape == (rows, -(-columns // 32))
    assert packed.columns == columns
    assert torch.equal(unpack(packed.words, columns), mask)


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 576, 1536])
def test_padding_is_zero_and_every_bit_counts_once(columns: int) -> None:
    mask = torch.ones(3, columns, dtype=torch.bool)
    words = pack(mask).words
    bits = sum((words >> bit & 1).sum().item() for bit in range(32))
    assert bits == mask.sum().item()


def test_the_first_column_is_the_least_significant_bit() -> None:
    mask = torch.zeros(1, 40, dtype=torch.bool)
    mask[0, [0, 5, 31, 33]] = True
    assert pack(mask).words.tolist() == [[1 + 2**5 - 2**31, 2]]


def test_words_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="33 columns has 2 int32 words"):
        unpack(torch.zeros(1, 1, dtype=torch.int32), 33)
