"""Random numbers that belong to an entry of a tensor: the same however the tensor is cut into pieces."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_PER_BLOCK = 4
"""Philox makes four numbers of one count."""


def dropped(key: tuple[object, ...], start: int, count: int, share: float) -> torch.Tensor:
    """Return for ``count`` entries from ``start`` on whether each is dropped (bool), with probability ``share``.

    ``key`` says whose numbers these are, such as seed, expert and tensor.
    """
    seed = hashlib.sha256(repr(key).encode()).digest()[:16]
    first = start // _PER_BLOCK
    numbers = np.random.Philox(counter=first, key=int.from_bytes(seed, "little"))
    skip = start - first * _PER_BLOCK
    drawn = numbers.random_raw(skip + count)[skip:]
    return torch.from_numpy(drawn < np.uint64(min(round(share * 2.0**64), 2**64 - 1)))
