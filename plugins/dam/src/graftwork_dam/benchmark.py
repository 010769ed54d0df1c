"""The benchmark ``dam:additivity``: do the losses of low rank and of rounding add up, and does a diagonal help?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from graftwork import Benchmark, LineChart, Measurement, WeightTransform
from graftwork.evaluate.benchmarks import Evaluation
from graftwork.evaluate.modes import evaluating
from graftwork.transform.calibration import read_windows
from graftwork.transform.engine import Engine, Texts
from graftwork.transform.options import TransformOptions
from graftwork.transform.scheme import FULL
from graftwork.transform.source import ModelSource
from pydantic import ValidationError

from graftwork_dam.settings import COMPOSITIONS, AdditivityOptions, Setting, metric_words, settings
from graftwork_dam.study import Study, summed

SERIES = {
    "l": "low rank alone",
    "q": "rounding alone",
    "sum": "sum of both alone",
    "q_of_l": "Q(L(W))",
    "ql": "L(Q(W)), factors in numbers",
    "qlq": "L(Q(W)), factors rounded",
    "p0": "U, SV",
    "p05": "S^1/2 split",
    "p1": "US, V",
    "grid": "best of ten diagonals",
    "learned": "DAM",
}
Losses = Mapping[Setting, Sequence[float]]


def additivity_benchmark(section: Mapping[str, Any] | None = None) -> Benchmark:
    """Return the benchmark, with the metrics that ``section`` (of a recipe) asks for, all where it is not ours."""
    options = {key: value for key, value in (section or {}).items() if key != "name"}
    try:
        asked = AdditivityOptions.model_validate(options)
    except ValidationError:
        # Told when the options are read.
        asked = None
    return Benchmark(
        "errors of low rank, rounding, both in every order, and DAM: on weights, outputs and likelihood",
        metric_words(asked),
        measure_additivity,
        AdditivityOptions,
    )


def measure_additivity(evaluation: Evaluation) -> Measurement:
    """Measure all settings in one pass through the model."""
    options: AdditivityOptions = evaluation.options
    model = evaluation.model
    texts = TransformOptions(
        calibration=options.calibration,
        samples=options.samples,
        window=options.window,
        evaluation=[options.evaluation],
        evaluation_window=options.window,
        evaluation_windows=options.evaluation_windows,
        overlap=options.overlap,
    )
    windows = read_windows(texts, evaluation.tokenizer, model.config, evaluation.run.seed)
    study = Study(options, windows.evaluation[0])
    with evaluating(model):
        study.start(model)
        Engine(
            ModelSource(model),
            [("dam", WeightTransform("additivity", study.block))],
            Texts(windows.calibration),
            batch_size=options.batch_size,
            seed=evaluation.run.seed,
            dense=False,
            console=evaluation.console,
            device=model.device,
        ).run()
        dense = study.nll(model, None)
        losses = {
            one: [after - before for after, before in zip(study.nll(model, one), dense, strict=True)]
            for one in study.settings
        }
    items = _items(study, losses)
    return Measurement(
        {"dense_nll": dense, **items},
        charts=charts(study, losses),
        rows=_rows(study, losses),
        files={"additivity.json": _file(study, losses)},
        notes=[
            *windows.notes,
            f"metrics are of ratio {options.ratios[0]:g}; calibration inputs are those of the unchanged model",
        ],
    )


def added(study: Study, losses: Losses, one: Setting) -> list[float]:
    """Return, window by window, the losses of low rank alone and of rounding alone, added."""
    low, rounded = losses[Setting("l", one.ratio)], losses[Setting("q", None, one.bits)]
    return [a + b for a, b in zip(low, rounded, strict=True)]


def gaps_by_linear(study: Study, one: Setting, level: str) -> dict[str, float]:
    """Return, linear by linear, a setting's error beyond those of low rank alone and rounding alone."""
    alone = summed([study.errors[Setting("l", one.ratio)], study.errors[Setting("q", None, one.bits)]], level)
    return {name: getattr(errors, level) - alone[name] for name, errors in study.errors[one].items()}


def ratios_by_linear(study: Study, one: Setting, level: str) -> dict[str, float]:
    """Return, linear by linear, a setting's squared error over the sum of both squared errors alone.

    Above 1 the errors have a positive inner product: they reinforce each other.
    """
    low, rounded = study.errors[Setting("l", one.ratio)], study.errors[Setting("q", None, one.bits)]
    found = {}
    for name, errors in study.errors[one].items():
        alone = getattr(low[name], level) ** 2 + getattr(rounded[name], level) ** 2
        found[name] = getattr(errors, level) ** 2 / alone if alone else 1.0
    return found


def _items(study: Study, losses: Losses) -> dict[str, list[float]]:
    """Return the metrics at the first ratio: windows for likelihood, linears for the other levels."""
    first = study.options.ratios[0]
    found: dict[str, list[float]] = {}
    for one in study.settings:
        if one.ratio not in (None, first):
            continue
        found[f"delta_{one.kind}{one.suffix}"] = list(losses[one])
        if one.kind not in COMPOSITIONS or one.latents != FULL:
            continue
        expected = added(study, losses, one)
        found[f"delta_sum_w{one.bits}"] = expected
        found[f"gap_{one.kind}{one.suffix}"] = [a - b for a, b in zip(losses[one], expected, strict=True)]
        for level in ("tensor", "dot"):
            found[f"{level}_gap_{one.kind}{one.suffix}"] = [*gaps_by_linear(study, one, level).values()]
            found[f"{level}_ratio_{one.kind}{one.suffix}"] = [*ratios_by_linear(study, one, level).values()]
    return found


def _bits(study: Study, one: Setting) -> float:
    """Return the bits per weight of all linears together."""
    errors, parameters = study.errors[one], study.parameters
    return math.fsum(errors[n].bits * parameters[n] for n in errors) / sum(parameters.values())


def _rows(study: Study, losses: Losses) -> list[dict[str, Any]]:
    """Return one record per setting."""
    found = []
    for one in study.settings:
        errors = study.errors[one].values()
        row: dict[str, Any] = {
            "setting": one.words,
            "kind": one.kind,
            "ratio": one.ratio,
            "bits": one.bits,
            "latents": one.latents,
            "bits_per_weight": _bits(study, one),
            "delta_nll": _mean(losses[one]),
            "tensor_error": _mean(e.tensor for e in errors),
            "dot_error": _mean(e.dot for e in errors),
        }
        if one.kind in COMPOSITIONS:
            row["gap"] = _mean(losses[one]) - _mean(added(study, losses, one))
            for level in ("tensor", "dot"):
                row[f"{level}_gap"] = _mean(gaps_by_linear(study, one, level).values())
                row[f"{level}_ratio"] = _mean(ratios_by_linear(study, one, level).values())
        found.append(row)
    return found


def _file(study: Study, losses: Losses) -> dict[str, Any]:
    """Return everything by setting: windows and linears."""
    return {
        one.words: {
            "delta_nll": list(losses[one]),
            "linears": {name: [e.tensor, e.dot] for name, e in study.errors[one].items()},
        }
        for one in study.settings
    }


def charts(study: Study, losses: Losses) -> list[LineChart]:
    """Return error over bits at the first ratio, and over ratios at every number of bits, at the three levels."""
    options = study.options
    found = []
    for level, y, caption in _LEVELS:
        value = _value(study, losses, level)
        for latents in options.latents:
            if latents != FULL and level != "nll":
                continue
            tail = "" if latents == FULL else f", latents of {latents} bits"
            over = {
                name: [(float(b), value(kind, options.ratios[0], b, latents)) for b in sorted(options.bits)]
                for kind, name in _series(options, latents)
            }
            if len(options.bits) > 1:
                title = f"{y} over bits, ratio {options.ratios[0]:g}{tail}"
                found.append(LineChart(title, caption, "bits of weights", y, over))
            if len(options.ratios) > 1:
                for bits in options.bits:
                    over = {
                        name: [(r, value(kind, r, bits, latents)) for r in sorted(options.ratios)]
                        for kind, name in _series(options, latents)
                    }
                    title = f"{y} over the kept ratio, {bits} bits{tail}"
                    found.append(LineChart(title, caption, "kept share of parameters", y, over))
    return found


_LEVELS = (
    ("nll", "nats per token lost", "Loss of likelihood on the evaluation text."),
    ("dot", "output error", "||X (W - W^)^T|| / ||X W^T||, mean over linears, on the calibration text."),
    ("tensor", "weight error", "||W - W^|| / ||W||, mean over linears."),
)


def _series(options: AdditivityOptions, latents: int) -> list[tuple[str, str]]:
    kinds = {one.kind for one in settings(options) if one.latents == latents}
    return [(kind, name) for kind, name in SERIES.items() if kind in kinds or kind in ("l", "q", "sum")]


def _value(study: Study, losses: Losses, level: str) -> Any:
    """Return a function from (kind, ratio, bits, latents) to the mean error at a level."""

    def of(one: Setting) -> float:
        if level == "nll":
            return _mean(losses[one])
        return _mean(getattr(errors, level) for errors in study.errors[one].values())

    def value(kind: str, ratio: float, bits: int, latents: int) -> float:
        low, rounded = Setting("l", ratio), Setting("q", None, bits)
        if kind == "l":
            return of(low)
        if kind == "q":
            return of(rounded)
        return of(low) + of(rounded) if kind == "sum" else of(Setting(kind, ratio, bits, latents))

    return value


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return math.fsum(known) / len(known)
