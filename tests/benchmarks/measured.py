"""Measure two sides in pairs, hold their ratio to a limit, and write what came out."""

from __future__ import annotations

import csv
import io
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from graftwork.files import write_text_atomic
from tqdm import tqdm


@dataclass(frozen=True)
class Row:
    """One comparison. ``ratio`` is subject over peer, with a 95% interval where it was measured in pairs."""

    benchmark: str
    subject: str
    peer: str
    ratio: float
    low: float
    high: float
    limit: float
    subject_value: float
    peer_value: float
    unit: str
    pairs: int
    device: str
    threads: int


class Record:
    """Collects the rows of a session, holds each to its limit, and writes them to ``folder`` as CSV."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[Row] = []

    def __call__(
        self,
        benchmark: str,
        subject: tuple[str, Sequence[float]],
        peer: tuple[str, Sequence[float]],
        *,
        limit: float,
        unit: str,
        allowed: Callable[[float], float] = lambda value: value,
    ) -> None:
        """Record the median of subject / ``allowed``(peer) over pairs and fail if it is above ``limit``.

        ``subject`` and ``peer`` are names with values measured in turn, so that what disturbs the machine
        disturbs both sides of a pair. The row is written before it is judged.
        """
        ratios = [one / allowed(other) for one, other in zip(subject[1], peer[1], strict=True)]
        ratio, (low, high) = statistics.median(ratios), median_interval(ratios)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        values = statistics.median(subject[1]), statistics.median(peer[1])
        self.rows.append(
            Row(
                benchmark, subject[0], peer[0], ratio, low, high, limit, *values, unit, len(ratios),
                device, torch.get_num_threads(),
            )
        )  # fmt: skip
        self.write()
        assert ratio <= limit, (
            f"{benchmark}: {subject[0]} is {ratio:.4f} [{low:.4f}, {high:.4f}] of {peer[0]} over "
            f"{len(ratios)} pairs, limit {limit}; medians {values[0]:.4g} and {values[1]:.4g} {unit}"
        )

    def table(self) -> str:
        """Return all rows as plain text."""
        lines = [("benchmark", "subject", "peer", "ratio", "95% interval", "limit", "medians", "pairs")]
        for row in self.rows:
            interval = f"{row.low:.3f} - {row.high:.3f}" if row.pairs > 5 else ""
            medians = f"{row.subject_value:.4g} : {row.peer_value:.4g} {row.unit}"
            ratio = f"{row.ratio:.3f}{'' if row.ratio <= row.limit else ' MISSED'}"
            names = (row.benchmark, row.subject, row.peer)
            lines.append((*names, ratio, interval, f"{row.limit:g}", medians, str(row.pairs)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        last = self.rows[-1]
        return "\n".join([*text, f"device: {last.device}; threads: {last.threads}"])

    def write(self) -> None:
        """Write ``<benchmark>.csv`` for every benchmark measured so far."""
        by_name = defaultdict(list)
        for row in self.rows:
            by_name[row.benchmark].append(asdict(row))
        for name, rows in by_name.items():
            text = io.StringIO()
            writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_text_atomic(self.folder / f"{name}.csv", text.getvalue())


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of the median by order statistics, which assumes no distribution."""
    ordered, middle = sorted(values), len(values) / 2
    reach = 0.98 * math.sqrt(len(values))
    return ordered[max(0, math.floor(middle - reach))], ordered[
        min(len(values), math.ceil(middle + reach)) - 1
    ]


def in_pairs(
    first: Callable[[], float], second: Callable[[], float], *, pairs: int, label: str, warmup: int = 1
) -> tuple[list[float], list[float]]:
    """Call both in turn, in changing order, after ``warmup`` calls of each that do not count."""
    values: tuple[list[float], list[float]] = ([], [])
    for _ in range(warmup):
        first(), second()
    for index in progress(range(pairs), label):
        for side in (0, 1) if index % 2 else (1, 0):
            values[side].append((first, second)[side]())
    return values


def progress(steps: Iterable[int] | None, label: str, total: int | None = None) -> tqdm[Any]:
    """Return a bar on standard error; into a file it writes a line now and then."""
    every = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(steps, label, total, file=sys.stderr, leave=False, mininterval=every, unit="step")
