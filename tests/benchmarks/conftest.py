"""The fixture that collects what the benchmarks measure and prints it once at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for the helpers beside the tests


@pytest.fixture(scope="session")
def record() -> Iterator[Any]:
    """Yield a :class:`measured.Record`; its table is printed when the session ends."""
    from graftwork.train.job import quiet_libraries
    from measured import Record

    quiet_libraries()
    record = Record(HERE / "results")
    yield record
    if record.rows:
        print(f"\n\n{record.table()}\nwritten to {record.folder}")
