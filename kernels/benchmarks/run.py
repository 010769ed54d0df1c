"""Measure the ops on this machine: ``python kernels/benchmarks/run.py [OP ...] [--device cuda] [--quick]``.

Prints a table and writes a CSV and a plot per op to ``kernels/benchmarks/results``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import COLUMNS, measure, peaks, write

OPS = sorted(path.stem.removesuffix("_bench") for path in Path(__file__).parent.glob("*_bench.py"))


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description="Time the kernels against their rivals and the device's floor."
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; all where none is named")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, to see that it runs; nothing is written"
    )
    asked = parser.parse_args()
    unknown = [op for op in asked.ops if op not in OPS]
    if unknown:
        parser.error(f"there is no op '{unknown[0]}'; known: {', '.join(OPS)}")
    device = torch.device(asked.device)
    known = peaks(device)
    products = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {speed / 1e9:.4g}" for dtype, speed in known.products.items()
    )
    print(f"copy {known.bandwidth / 1e9:.4g} GB/s; products, GFLOP/s: {products}")
    for op in asked.ops or OPS:
        cases = importlib.import_module(f"{op}_bench").cases(device, quick=asked.quick)
        rows = measure(cases, device, known, 0.1 if asked.quick else 2.0)
        shown = [column for column in COLUMNS if column not in ("op", "device", "threads")]
        table = [shown, *([str(row.get(column, "")) for column in shown] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print(f"\n{op} on {rows[0]['device']}, {rows[0]['threads']} threads")
        print("\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in table))
        if not asked.quick:
            print(f"written: {write(op, rows)}")


if __name__ == "__main__":
    main()
