"""The largest entries: exactly as many as asked for, the same as on a dense copy, however the pieces are cut."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from graftwork.merge.method import Piece
from graftwork.merge.select import largest
from hypothesis import given, settings
from hypothesis import strategies as st

SHAPES = [(1, 7), (5, 6), (1, 1), (4, 9)]


def pieces(deltas: torch.Tensor, step: int) -> Iterator[Piece]:
    """Cut ``experts x entries`` into parameters of ``SHAPES`` and these into pieces of ``step`` rows."""
    start = 0
    for order, (rows, columns) in enumerate(SHAPES):
        whole = deltas[:, start : start + rows * columns].reshape(len(deltas), rows, columns)
        start += rows * columns
        for first in range(0, rows, step):
            part = slice(first, min(rows, first + step))
            base = torch.zeros(part.stop - first, columns)
            yield Piece(f"p{order}", order, part, ("a", "b"), base, whole[:, part])


def kept(deltas: torch.Tensor, keep: int, step: int) -> list[torch.Tensor]:
    cuts = largest(lambda: pieces(deltas, step), keep, len(deltas))
    for piece in pieces(deltas, step):
        for index, cut in enumerate(cuts):
            size, end = piece.deltas[index].abs().flatten(), cut.end(piece)
            first = torch.arange(len(size)) < end
            found = (size > cut.value) | ((size == cut.value) & first)
            assert torch.equal(found, cut.keeps(piece, index).flatten())
    return [
        torch.cat([cut.keeps(piece, index).flatten() for piece in pieces(deltas, step)])
        for index, cut in enumerate(cuts)
    ]


def dense(values: torch.Tensor, keep: int) -> torch.Tensor:
    """The largest by size, of equal ones the first, by a stable sort."""
    order = torch.sort(values.abs(), descending=True, stable=True).indices
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[order[:keep]] = True
    return mask


@settings(deadline=None)
@given(data=st.data())
def test_equal_to_a_stable_sort(data: st.DataObject) -> None:
    count = sum(rows * columns for rows, columns in SHAPES)
    # Few values, so that many are equal; both zeros, and one that is not normal.
    values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001, 2.5, -2.5, 1e-40, 3e38])
    rows = data.draw(st.lists(st.lists(values, min_size=count, max_size=count), min_size=2, max_size=2))
    keep = data.draw(st.integers(1, count))
    deltas = torch.tensor(rows)
    for step in (1, 2, 100):
        for mask, one in zip(kept(deltas, keep, step), deltas, strict=True):
            assert torch.equal(mask, dense(one, keep))


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 1.0])
def test_exact_on_many_values(share: float) -> None:
    count = 200_000
    draw = torch.Generator().manual_seed(2)
    # As in differences of bfloat16 weights, only a few thousand values are different.
    deltas = torch.randn(2, 1, count, generator=draw).bfloat16().float()
    deltas[:, :, ::3] = 0
    keep = int(share * count)

    def cut() -> Iterator[Piece]:
        yield Piece("p", 0, slice(0, 1), ("a", "b"), deltas[0], deltas)

    (piece,) = cut()
    for index, found in enumerate(largest(cut, keep, 2)):
        mask = found.keeps(piece, index).flatten()
        assert mask.sum().item() == keep
        assert torch.equal(mask, dense(deltas[index].flatten(), keep))
