"""What a transform job reports, in the form of a benchmark's result: metrics, items for claims, charts, notes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from graftwork.hookspecs import LineChart, WeightTransform
from graftwork.transform.engine import Outcome
from graftwork.transform.progress import LayerRecord

if TYPE_CHECKING:
    from graftwork.transform.job import Prepared

TRANSFORM = "transform"
"""Stands where a benchmark's name would, so that tables and claims treat transform jobs alike."""

_TEXT = {
    "perplexity": "per token, after",
    "dense_perplexity": "of the unchanged model",
    "nll": "nats per token, after",
    "delta_nll": "nats per token, after minus before, window by window",
}
METRICS = {
    **_TEXT,
    "calibration_nll": "nats per token on the calibration windows, after",
    "overfit": "nll minus calibration_nll",
    "bits_per_weight": "all that is stored of the linears, per weight they had",
    "layer_error": "squared error of a layer's output relative to its square, mean over layers",
    "flatness_before": "weights: 0 where all are equally large, 1 for a single one",
    "flatness_after": "the same after",
    "input_flatness_before": "inputs of the linears",
    "input_flatness_after": "the same after, rotated where they are",
    "size_mb": "all weights of the checkpoint, 10^6 bytes",
}


def metric_words(transforms: Sequence[tuple[str, WeightTransform]], texts: int) -> dict[str, str]:
    """Return all metrics that a job with these transforms and so many evaluation texts may measure, in words."""
    more = {f"{name}_{n}": words for n in range(2, texts + 1) for name, words in _TEXT.items()}
    own = {name: words for _, transform in transforms for name, words in transform.figures.items()}
    return {**METRICS, **more, **own}


def measurement(ready: Prepared, outcome: Outcome) -> dict[str, Any]:
    """Return the result's part that a benchmark would give."""
    words = metric_words(ready.transforms, len(ready.windows.evaluation))
    metrics: dict[str, float | None] = {}
    items: dict[str, list[float]] = {}
    notes = [*ready.windows.notes, *outcome.notes]
    start = 0
    for number, windows in enumerate(ready.windows.evaluation, 1):
        end = start + len(windows)
        tail = "" if number == 1 else f"_{number}"
        after, before = outcome.nll[start:end], outcome.dense_nll[start:end]
        start = end
        metrics[f"perplexity{tail}"] = _perplexity(after)
        metrics[f"nll{tail}"] = _finite(_mean(after))
        bad = sum(not math.isfinite(one) for one in after)
        if bad:
            notes.append(
                f"{bad} of {len(after)} windows of '{ready.options.evaluation[number - 1]}' gave no number"
            )
        else:
            items[f"nll{tail}"] = after
        if before:
            metrics[f"dense_perplexity{tail}"] = _perplexity(before)
            metrics[f"delta_nll{tail}"] = _finite(_mean(after) - _mean(before))
            if not bad:
                items[f"delta_nll{tail}"] = [a - b for a, b in zip(after, before, strict=True)]
    if outcome.calibration_nll is not None:
        metrics["calibration_nll"] = _finite(outcome.calibration_nll)
        if outcome.nll:
            metrics["overfit"] = _finite(_mean(outcome.nll) - outcome.calibration_nll)
    metrics |= _of_layers(outcome.layers)
    for name in words:
        values = [
            float(record[name])
            for layer in outcome.layers
            for record in layer.linears.values()
            if isinstance(record.get(name), int | float)
        ]
        if values:
            metrics[name] = _finite(_mean(values))
    return {
        "benchmark": TRANSFORM,
        "metrics": {name: metrics[name] for name in words if name in metrics},
        "words": {name: text for name, text in words.items() if name in metrics or name == "size_mb"},
        "items": items,
        "lines": [asdict(chart) for chart in _charts(outcome.layers)],
        "notes": notes,
    }


def _of_layers(layers: Sequence[LayerRecord]) -> dict[str, float | None]:
    found: dict[str, float | None] = {
        "bits_per_weight": sum(one.bits for one in layers) / max(1, sum(one.parameters for one in layers)),
        "layer_error": _finite(_mean(one.error for one in layers if one.error is not None)),
    }
    for name, pairs in (
        ("flatness", [one.weights_flatness for one in layers]),
        ("input_flatness", [one.inputs_flatness for one in layers]),
    ):
        known = [pair for pair in pairs if pair is not None]
        if known:
            found[f"{name}_before"] = _finite(_mean(pair[0] for pair in known))
            found[f"{name}_after"] = _finite(_mean(pair[1] for pair in known))
    return {name: value for name, value in found.items() if value is not None}


def _charts(layers: Sequence[LayerRecord]) -> list[LineChart]:
    errors = [(float(i), one.error) for i, one in enumerate(layers) if one.error is not None]
    charts = []
    if errors:
        charts.append(
            LineChart(
                "error of each layer",
                "Squared error of the layer's output on the first batch, relative to the output's square.",
                "layer",
                "relative error",
                {"error": errors},
            )
        )
    for title, pairs in (
        ("flatness of the weights", [one.weights_flatness for one in layers]),
        ("flatness of the inputs", [one.inputs_flatness for one in layers]),
    ):
        series = {
            when: [(float(i), pair[k]) for i, pair in enumerate(pairs) if pair is not None]
            for k, when in enumerate(("before", "after"))
        }
        if series["before"]:
            caption = "0: all entries are equally large; 1: a single entry has all the energy."
            charts.append(LineChart(title, caption, "layer", "1 - H / ln N", series))
    return charts


def _perplexity(nll: Sequence[float]) -> float | None:
    mean = _mean(nll)
    return math.exp(mean) if math.isfinite(mean) and mean < 700 else None


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return math.fsum(known) / len(known) if known else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
