"""Time the sides of a case in turn, and compare each with the floor that the device itself sets.

The floor of a case is the time that its least traffic takes at the bandwidth of a large copy, or its least arithmetic
at the speed of a large matrix product, whichever is longer; both are measured in the same run.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "op", "case", "dtype", "side", "milliseconds", "gb_per_s", "gflop_per_s", "share_of_floor", "ratio_to_ours",
    "device", "threads",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One shape of one op.

    Attributes:
        op, name: of the op and the shape.
        dtype: of the inputs.
        sides: name: call without arguments; the first is ours. What is compared is named (eager, compile, a rival).
        bytes_moved: least that must be read and written.
        flops: least arithmetic.
        missing: rivals that could not be measured, with the reason.
    """

    op: str
    name: str
    dtype: torch.dtype
    sides: Mapping[str, Callable[[], object]]
    bytes_moved: float
    flops: float = 0.0
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Peaks:
    """Measured speed of a device: bytes a second of a large copy, FLOP a second of a large product per dtype."""

    bandwidth: float
    products: Mapping[torch.dtype, float]

    def floor(self, case: Case) -> float:
        """Return the least time of a case, in seconds."""
        speed = self.products.get(case.dtype, max(self.products.values()))
        return max(case.bytes_moved / self.bandwidth, case.flops / speed)


def timed(calls: Iterable[Callable[[], object]], device: torch.device, seconds: float) -> list[float]:
    """Return the median seconds of each call; all are called in turn, so what disturbs one disturbs all."""
    calls = list(calls)
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
        call()
    began = time.perf_counter()
    while len(taken[0]) < 5 or (time.perf_counter() - began < seconds * len(calls) and len(taken[0]) < 200):
        for one, call in zip(taken, calls, strict=True):
            one.append(_once(call, device))
    return [statistics.median(one) for one in taken]


def _once(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # Caches are flushed, so that every call reads from memory.
    torch.empty(2**26, dtype=torch.int32, device=device).zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def peaks(device: torch.device) -> Peaks:
    """Measure the device."""
    cuda = device.type == "cuda"
    source = torch.empty(2**30 if cuda else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (copy,) = timed([lambda: target.copy_(source)], device, 1.0)
    wide = 8192 if cuda else 1024
    products = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a = torch.randn(wide, wide, device=device).to(dtype)
        (product,) = timed([lambda a=a: a @ a], device, 1.0)
        products[dtype] = 2 * wide**3 / product
    return Peaks(2 * source.numel() / copy, products)


def measure(
    cases: Iterable[Case], device: torch.device, known: Peaks, seconds: float
) -> list[dict[str, object]]:
    """Return a row per case and side; a rival that is missing has a row that says why."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rows: list[dict[str, object]] = []
    for case in cases:
        times = timed(case.sides.values(), device, seconds)
        floor = known.floor(case)
        shared = {"op": case.op, "case": case.name, "dtype": str(case.dtype).removeprefix("torch.")}
        shared |= {"device": name, "threads": torch.get_num_threads()}
        for side, taken in zip(case.sides, times, strict=True):
            rows.append(
                {
                    **shared,
                    "side": side,
                    "milliseconds": f"{1000 * taken:.4g}",
                    "gb_per_s": f"{case.bytes_moved / taken / 1e9:.4g}",
                    "gflop_per_s": f"{case.flops / taken / 1e9:.4g}",
                    "share_of_floor": f"{floor / taken:.3f}",
                    "ratio_to_ours": f"{taken / times[0]:.3f}",
                }
            )
        rows += [{**shared, "side": f"{side} ({why})"} for side, why in case.missing.items()]
    return rows


def write(op: str, rows: list[dict[str, object]]) -> Path:
    """Write ``results/<op>-<device>.csv`` and a bar chart beside it; return the table's path."""
    slug = "-".join(str(rows[0]["device"]).lower().split()).replace("/", "-")
    path = RESULTS / f"{op}-{slug}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    timed_rows = [row for row in rows if "milliseconds" in row]
    labels = [f"{row['case']} {row['dtype']}\n{row['side']}" for row in timed_rows]
    figure, axis = plt.subplots(figsize=(7, 0.5 + 0.36 * len(labels)))
    colours = ["#4477aa" if row["side"] == "ours" else "#bbccdd" for row in timed_rows]
    axis.barh(labels, [float(str(row["share_of_floor"])) for row in timed_rows], color=colours)
    axis.axvline(1.0, color="#999999", linewidth=1)
    axis.invert_yaxis()
    axis.tick_params(labelsize=7)
    axis.set_xlabel(
        f"{op}: share of the floor on {rows[0]['device']} (1: as fast as the device can)", fontsize=8
    )
    figure.savefig(path.with_suffix(".svg"), bbox_inches="tight")
    plt.close(figure)
    return path


def compiled(call: Callable[..., object]) -> Callable[..., object]:
    """Return ``torch.compile`` of a call, for the side of that name."""
    return torch.compile(call, dynamic=False)
