"""One bit per weight: packed into 32-bit words, row by row.

A mask of rows x columns becomes int32 words, rows x ceil(columns / 32): column c is bit ``c % 32`` of word ``c // 32``,
counted from the least significant one. Bits behind the last column are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

FORMAT = "bitmask/1"
WORD = 32


@dataclass(frozen=True)
class Bits:
    """A packed mask: ``words`` (int32, rows x ceil(columns / 32)) of ``columns`` bits a row."""

    words: torch.Tensor
    columns: int


def pack(mask: torch.Tensor) -> Bits:
    """Return a bool mask (rows x columns) packed."""
    rows, columns = mask.shape
    packed = np.packbits(mask.cpu().numpy(), axis=1, bitorder="little")
    whole = np.zeros((rows, _words(columns) * (WORD // 8)), np.uint8)
    whole[:, : packed.shape[1]] = packed
    return Bits(torch.from_numpy(whole.view("<i4").astype(np.int32, copy=False)), columns)


def unpack(words: torch.Tensor, columns: int) -> torch.Tensor:
    """Return words (int32, rows x ceil(columns / 32)) as a bool mask (rows x columns).

    Raises:
        ValueError: the words are of another type, or too many or too few for so many columns.
    """
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] != _words(columns):
        raise ValueError(
            f"a mask of {columns} columns has {_words(columns)} int32 words a row, not {tuple(words.shape)} of "
            f"{words.dtype}"
        )
    raw = words.cpu().contiguous().numpy().astype("<i4", copy=False).view(np.uint8)
    return torch.from_numpy(np.unpackbits(raw, axis=1, count=columns, bitorder="little")).bool()


def _words(columns: int) -> int:
    return -(-columns // WORD)
