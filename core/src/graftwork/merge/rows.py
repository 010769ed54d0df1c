"""Rows of tensors read straight from safetensors files, without mapping the files into memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftwork.errors import UserError
from graftwork.files import safetensors_header, sha256

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: ``start`` is where its bytes begin."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns; see :class:`graftwork.merge.method.Piece`."""
        return as_matrix(self.shape)


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return a tensor's shape as rows and columns: one axis is one row, the axes behind the first are columns."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def stored_tensors(paths: list[Path]) -> dict[str, Stored]:
    """Return the tensors of some files by their keys.

    Raises:
        UserError: a damaged file.
    """
    found: dict[str, Stored] = {}
    for path in paths:
        entries: Mapping[str, Any] = safetensors_header(path)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        begin = path.stat().st_size - end
        for key, entry in entries.items():
            found[key] = Stored(path, entry["dtype"], tuple(entry["shape"]), begin + entry["data_offsets"][0])
    return found


def read_rows(tensor: Stored, rows: slice) -> torch.Tensor:
    """Return rows of a stored tensor, as a matrix in the dtype that it is stored in.

    Raises:
        UserError: the file cannot be read.
    """
    columns = tensor.matrix[1]
    dtype = DTYPES[tensor.dtype]
    found = torch.empty(rows.stop - rows.start, columns, dtype=dtype)
    raw = found.view(torch.uint8).numpy().reshape(-1).data if found.numel() else memoryview(b"")
    begin = tensor.start + rows.start * columns * dtype.itemsize
    try:
        with tensor.path.open("rb", buffering=0) as file:
            file.seek(begin)
            done = 0
            while done < len(raw):
                # One call reads 2 GiB at most.
                count = file.readinto(raw[done:])
                if not count:
                    raise OSError("it ends early")
                done += count
    except OSError as error:
        raise UserError(f"'{tensor.path}' cannot be read: {error}") from None
    return found


def digest(paths: list[Path]) -> str:
    """Return the SHA-256 of a checkpoint's files: of the one file, or of the lines that ``sha256sum`` would print."""
    if len(paths) == 1:
        return sha256(paths[0])
    lines = "".join(f"{sha256(path)}  {path.name}\n" for path in sorted(paths, key=lambda path: path.name))
    return hashlib.sha256(lines.encode()).hexdigest()
