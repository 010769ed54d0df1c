"""The benchmark ``d3:tune``: which layers to leave out, chosen on the full model's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graftwork import Benchmark, LineChart, Measurement, UserError
from graftwork.evaluate.benchmarks import Evaluation
from pydantic import Field

from graftwork_d3.compare import FullModel
from graftwork_d3.options import Layer
from graftwork_d3.schedule import EXPECTED_TOKENS, DepthSchedule
from graftwork_d3.score import teacher_forced
from graftwork_d3.stack import find_decoder
from graftwork_d3.texts import Scored, TextOptions, answers_json, digest, scored_texts

METRICS = {
    "kl": "chosen schedule: KL(full || D3), nats per token",
    "agreement": "chosen schedule: same first token as full",
    "flex_start": "chosen schedule: first layer that may be left out",
    "points": "schedules that were scored",
}


class TuneOptions(TextOptions):
    """Options of d3:tune."""

    target_ratio: float = Field(
        0.9, gt=0, le=1, description="budget of the schedule that is written to d3.json"
    )
    expected_tokens: int = Field(
        EXPECTED_TOKENS, ge=1, description="new tokens over which the written schedule meets target_ratio"
    )
    ratios: list[float] = Field([0.95, 0.9, 0.8, 0.67], description="further budgets of the grid")
    flex_starts: list[Layer] | None = Field(
        None, description="flex starts of the grid; 1, 1/8, 1/4, 3/8 and 1/2 of the layers if not set"
    )
    redundancy: bool = Field(
        True, description="also let layers leave by how little they change the hidden state, least first"
    )
    tail: int | None = Field(None, ge=1, description="as in the plugin's options")


@dataclass(frozen=True)
class Point:
    """A schedule of the grid and its KL and agreement for every item."""

    label: str
    ratio: float
    schedule: DepthSchedule
    kl: list[float]
    agree: list[float]

    @property
    def mean_kl(self) -> float:
        return sum(self.kl) / len(self.kl)


def starts(layers: int) -> list[int]:
    """Return the flex starts of the grid: 1, and eighths up to half of the layers."""
    return sorted({1, *(max(1, round(eighths * layers / 8)) for eighths in (1, 2, 3, 4))})


def grid(
    base: Sequence[DepthSchedule], ratios: Sequence[float], steps: int
) -> list[tuple[str, float, DepthSchedule]]:
    """Return (label, ratio, schedule) for every pair that can be: some minima are above some budgets."""
    return [
        (label_of(one), ratio, one.meeting(ratio, steps))
        for ratio in sorted(set(ratios), reverse=True)
        for one in base
        if one.minimum / one.layers <= ratio <= 1
    ]


def label_of(schedule: DepthSchedule) -> str:
    """Return the words by which a line of the chart is known."""
    return "by redundancy" if isinstance(schedule.order, tuple) else f"from layer {schedule.start}"


@torch.no_grad()
def redundancies(model: Any, items: Sequence[Scored]) -> list[float]:
    """Return 1 - cosine(h_in, h_out) of every layer, averaged over all tokens after the prompts.

    A small value says that the layer changes little (ours, as in work on pruning layers).
    """
    _, layers = find_decoder(model)
    sums = [0.0] * len(layers)
    count = 0
    prompt = 0

    def hook(number: int) -> Any:
        def note(module: Any, args: Any, output: torch.Tensor) -> None:
            before, after = args[0][:, prompt:].float(), output[:, prompt:].float()
            sums[number] += float((1 - torch.cosine_similarity(before, after, dim=-1)).sum())

        return note

    handles = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
    try:
        for item in items:
            prompt = len(item.prompt)
            ids = torch.tensor([item.prompt + item.answer], device=model.device)
            teacher_forced(model, ids, prompt)
            count += len(item.answer)
    finally:
        for handle in handles:
            handle.remove()
    return [one / count for one in sums]


def pareto(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats in both depth and KL, deepest first."""
    return [
        one
        for one in sorted(points, key=lambda point: -point.schedule.mean_ratio(len(point.kl)))
        if not any(
            other.ratio <= one.ratio
            and other.mean_kl <= one.mean_kl
            and (other.ratio, other.mean_kl) != (one.ratio, one.mean_kl)
            for other in points
        )
    ]


def measure(evaluation: Evaluation) -> Measurement:
    """Score the grid and write the best schedule at ``target_ratio``."""
    options: TuneOptions = evaluation.options
    _, layers = find_decoder(evaluation.model)
    count = len(layers)
    texts = scored_texts(evaluation)
    items = [item for item in texts if len(item.answer) > 1]
    if not items:
        raise UserError("no answer has two tokens, so there is nothing to leave layers out of")
    base = [
        DepthSchedule.of(count, alpha=1.0, start=start, tail=options.tail)
        for start in options.flex_starts or starts(count)
    ]
    redundant = redundancies(evaluation.model, items) if options.redundancy else None
    if redundant is not None:
        flexible = range(1, count - base[0].tail)
        order = sorted(flexible, key=lambda layer: (redundant[layer], layer))
        base.append(DepthSchedule.of(count, alpha=1.0, start=1, tail=options.tail, order=order))
    longest = max(len(item.answer) for item in items) - 1
    points = _scored(evaluation, items, grid(base, [options.target_ratio, *options.ratios], longest))
    there = [point for point in points if point.ratio == options.target_ratio]
    if not there:
        lowest = min(one.minimum for one in base)
        raise UserError(
            f"benchmark.target_ratio = {options.target_ratio:g} is below what half of {count} layers, kept at any "
            f"step, allow: {lowest / count:.3g}"
        )
    best = min(there, key=lambda point: point.mean_kl)
    chosen = best.schedule.meeting(options.target_ratio, options.expected_tokens)
    front = pareto(points)
    return Measurement(
        items={"kl": [*best.kl], "agreement": [*best.agree]},
        values={"flex_start": float(best.schedule.start), "points": float(len(points))},
        charts=[_chart(points)],
        rows=[{"item": item.name, "kl": best.kl[k]} for k, item in enumerate(items)],
        files={
            "answers.json": answers_json(texts),
            "d3.json": {
                "schedule": chosen.as_json(),
                "target_ratio": options.target_ratio,
                "expected_tokens": options.expected_tokens,
                "model": evaluation.run.job.model.ref,
                "calibration": digest(items),
                "redundancy": redundant,
                "grid": [_row(point) for point in points],
            },
        },
        notes=[
            f"chosen at mean depth {options.target_ratio:g}: layers leave {best.label}",
            *(
                f"not beaten in both: mean depth {point.ratio:g} {point.label}, KL {point.mean_kl:.3f}, "
                f"agreement {sum(point.agree) / len(point.agree):.1%}"
                for point in front
            ),
        ],
    )


def _scored(
    evaluation: Evaluation, items: Sequence[Scored], schedules: Sequence[tuple[str, float, DepthSchedule]]
) -> list[Point]:
    points = [Point(label, ratio, schedule, [], []) for label, ratio, schedule in schedules]
    with evaluation.console.bar(len(items), "score the grid") as bar:
        for item in items:
            full = FullModel(evaluation.model, item)
            for point in points:
                distance = full.distance(point.schedule)
                point.kl.append(float(distance.kl.mean()))
                point.agree.append(float(distance.agree.mean()))
            bar.update(1)
    return points


def _row(point: Point) -> dict[str, Any]:
    return {
        "layers_leave": point.label,
        "ratio": point.ratio,
        "alpha": point.schedule.alpha,
        "kl": point.mean_kl,
        "agreement": sum(point.agree) / len(point.agree),
    }


def _chart(points: Sequence[Point]) -> LineChart:
    series: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        series.setdefault(point.label, []).append((point.ratio, point.mean_kl))
    return LineChart(
        "KL against mean depth, by where layers are left out",
        "Scored on the full model's own answers. Lower is nearer to the full model.",
        "mean depth (share of the layers)",
        "KL, nats",
        {label: sorted(line) for label, line in series.items()},
    )


TUNE = Benchmark(
    summary="choose which layers D3 leaves out, by KL on the full model's own answers; writes d3.json",
    metrics=METRICS,
    measure=measure,
    options=TuneOptions,
)
