"""Tables on disk: parquet, written whole or not at all, the same bytes for the same rows."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from graftwork.files import write_bytes_atomic


def write_table(path: Path, columns: Mapping[str, Sequence[Any]], types: Mapping[str, pa.DataType]) -> None:
    """Write ``columns`` with the given types to ``path``."""
    table = pa.table({name: pa.array(columns[name], type=kind) for name, kind in types.items()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_bytes_atomic(path, buffer.getvalue())
