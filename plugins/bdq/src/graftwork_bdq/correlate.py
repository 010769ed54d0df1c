"""``python -m graftwork_bdq.correlate FOLDER...``: does flatness tell the error? Spearman's rank correlation.

Reads every ``transform.json`` under the folders, which `trainer transform` and `trainer run` leave there. A layer's
error is that of its output; its flatness, ``1 - H / ln N`` of its weights and of its inputs after the change. For the
single linears of BDQ it is the flatness of the weight that was rounded against its output's error (gptq), else against
its own.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftwork import UserError


def ranks(values: Sequence[float]) -> list[float]:
    """Return ranks from 1; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for index in order[start : end + 1]:
            found[index] = (start + end) / 2 + 1
        start = end + 1
    return found


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the rank correlation of two lists, in [-1, 1]; NaN for fewer than two points or a constant list."""
    if len(one) != len(other):
        raise ValueError(f"{len(one)} values against {len(other)}")
    if len(one) < 2:
        return math.nan
    a, b = ranks(one), ranks(other)
    middle = (len(a) + 1) / 2
    top = math.fsum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    size = math.fsum((x - middle) ** 2 for x in a) * math.fsum((y - middle) ** 2 for y in b)
    return top / math.sqrt(size) if size else math.nan


Points = dict[str, tuple[list[float], list[float]]]
KINDS = ("weights", "inputs", "linears")


def points(layers: Sequence[dict[str, Any]]) -> Points:
    """Return flatness and error of the layers, and of their linears, of one transform.json."""
    found: Points = {kind: ([], []) for kind in KINDS}
    for layer in layers:
        for kind in ("weights", "inputs"):
            pair, error = layer.get(f"{kind}_flatness"), layer.get("error")
            if pair is not None and error is not None:
                found[kind][0].append(pair[1])
                found[kind][1].append(error)
        for linear in layer.get("linears", {}).values():
            error = linear.get("output_error", linear.get("weight_error"))
            if "concentration" in linear and error is not None:
                found["linears"][0].append(linear["concentration"])
                found["linears"][1].append(error)
    return found


def report(folders: Sequence[Path]) -> list[str]:
    """Return a line per run and one for all runs together.

    Raises:
        UserError: no transform.json under the folders, or one that is none.
    """
    files = sorted(file for folder in folders for file in folder.rglob("transform.json"))
    if not files:
        raise UserError(f"no transform.json under {', '.join(map(str, folders))}; name the folder of a run")
    width = max(len(str(file.parent)) for file in files)
    every: Points = {kind: ([], []) for kind in KINDS}
    lines = [f"{'run':{width}}  layers" + "".join(f"{kind:>9}" for kind in KINDS)]
    for file in files:
        try:
            found = points(json.loads(file.read_text(encoding="utf-8"))["layers"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"'{file}' is no record of a transform") from None
        for what, (flat, errors) in found.items():
            every[what][0].extend(flat)
            every[what][1].extend(errors)
        lines.append(_line(str(file.parent), found, width))
    lines.append(_line("all", every, width))
    return lines


def main(arguments: Sequence[str]) -> int:
    """Print the report; 2 where the input is wrong."""
    try:
        if not arguments:
            raise UserError("name the folder of a run: python -m graftwork_bdq.correlate FOLDER...")
        print("\n".join(report([Path(one) for one in arguments])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _line(name: str, found: Points, width: int) -> str:
    values = "".join(f"{spearman(*found[kind]):+9.3f}" for kind in KINDS)
    return f"{name:{width}}  {len(found['weights'][0]):6d}{values}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
