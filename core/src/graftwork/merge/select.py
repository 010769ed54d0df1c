"""The K entries of largest size of each expert, exactly K of them, without holding more than a piece in memory.

Sizes of float32 numbers are ordered like their bit patterns. A first pass counts the upper 16 bits, a second one
the lower 16 bits of those entries whose upper ones are the threshold's. Where not all entries as large as the threshold
are kept, the first ones are: by the order of the parameters, then by their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from graftwork.merge.method import Piece

_HALF = 16
_BINS = 1 << _HALF


@dataclass(frozen=True)
class Cut:
    """Keep what is larger than ``value``, and of what is as large those before (``order``, ``index``).

    ``order`` is that of a parameter and ``index`` the place of an entry in it.
    """

    value: float
    order: int
    index: int

    def end(self, piece: Piece) -> int:
        """Return how many entries of a piece, from its first, are kept where they are as large as ``value``."""
        if piece.order != self.order:
            return piece.base.numel() if piece.order < self.order else 0
        return min(max(0, self.index - piece.offset), piece.base.numel())

    def keeps(self, piece: Piece, expert: int) -> torch.Tensor:
        """Return which entries of a piece are kept (bool, rows x columns)."""
        size = piece.deltas[expert].abs()
        if piece.order < self.order:
            return size >= self.value
        kept = size > self.value
        if piece.order == self.order and piece.offset < self.index:
            first = (size == self.value).flatten()
            first[self.index - piece.offset :] = False
            kept |= first.view_as(kept)
        return kept


def largest(pieces: Callable[[], Iterable[Piece]], keep: int, experts: int) -> list[Cut]:
    """Return for each expert the cut that keeps exactly ``keep`` entries.

    Args:
        pieces: starts a pass over all pieces, which come in order.
        keep: from 1 to the number of entries.
        experts: how many there are.
    """
    upper = torch.zeros(experts, _BINS, dtype=torch.int64)
    for piece in pieces():
        for index, bits in enumerate(_bits(piece)):
            upper[index] += torch.bincount(bits >> _HALF, minlength=_BINS)
    bins, left = _bin_of(upper, [keep] * experts)
    lower = torch.zeros(experts, _BINS, dtype=torch.int64)
    for piece in pieces():
        for index, bits in enumerate(_bits(piece)):
            mine = bits[(bits >> _HALF) == bins[index]]
            lower[index] += torch.bincount(mine & (_BINS - 1), minlength=_BINS)
    lows, ties = _bin_of(lower, left)
    values = [(high << _HALF) | low for high, low in zip(bins, lows, strict=True)]
    # Among the entries as large as the threshold, so many are kept of so many.
    wanted = {index: ties[index] for index in range(experts) if ties[index] < int(lower[index, lows[index]])}
    ends = _ends(pieces, values, wanted) if wanted else {}
    everything = (2**63 - 1, 0)
    sizes = torch.tensor(values, dtype=torch.int32).view(torch.float32).tolist()
    return [Cut(size, *ends.get(index, everything)) for index, size in enumerate(sizes)]


def _bits(piece: Piece) -> Iterable[torch.Tensor]:
    """Yield the bit patterns of the sizes of each expert's entries."""
    for delta in piece.deltas:
        yield delta.abs().flatten().view(torch.int32)


def _bin_of(counts: torch.Tensor, wanted: list[int]) -> tuple[list[int], list[int]]:
    """Return the bin (from the top) that holds the wanted-th entry, and how many of it are wanted."""
    bins, left = [], []
    for row, count in zip(counts, wanted, strict=True):
        above = row.flip(0).cumsum(0)
        place = int(torch.searchsorted(above, count))
        bins.append(_BINS - 1 - place)
        left.append(count - (int(above[place - 1]) if place else 0))
    return bins, left


def _ends(
    pieces: Callable[[], Iterable[Piece]], values: list[int], wanted: dict[int, int]
) -> dict[int, tuple[int, int]]:
    """Return behind which entry of which parameter the wanted number of entries of the threshold's size is reached."""
    ends: dict[int, tuple[int, int]] = {}
    seen = dict.fromkeys(wanted, 0)
    for piece in pieces():
        bits = list(_bits(piece))
        for index in [one for one in wanted if one not in ends]:
            equal = bits[index] == values[index]
            count = int(equal.sum())
            rest = wanted[index] - seen[index]
            if count >= rest:
                place = int(equal.nonzero()[rest - 1])
                ends[index] = (piece.order, piece.offset + place + 1)
            seen[index] += count
        if len(ends) == len(wanted):
            break
    return ends
