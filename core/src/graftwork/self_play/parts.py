"""Long work in parts: each part's result is a file, so that a killed run goes on with the first that is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftwork.distributed import barrier, rank_and_world
from graftwork.files import write_text_atomic


def in_parts(folder: Path, count: int, make: Callable[[int], list[Any]]) -> list[Any]:
    """Return the lists ``make(0)``, ..., ``make(count - 1)`` joined; what lies in ``folder`` is not made again.

    The parts are shared among the processes of the run; all of them get the whole. A part must not depend on
    who makes it.
    """
    rank, world = rank_and_world()
    for number in range(rank, count, world):
        path = _path(folder, number)
        if not path.exists():
            write_text_atomic(path, json.dumps(make(number), separators=(",", ":")))
    barrier()
    joined: list[Any] = []
    for number in range(count):
        joined += json.loads(_path(folder, number).read_text(encoding="utf-8"))
    # Nobody may tidy the folder up while another still reads.
    barrier()
    return joined


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.json"
