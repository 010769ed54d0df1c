"""The benchmark ``d3:fidelity``: how near to the full model a text is written at equal mean depth, by which layers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

import torch
from graftwork import Benchmark, LineChart, Measurement, UserError
from graftwork.evaluate.benchmarks import Evaluation
from pydantic import Field

from graftwork_d3 import policies
from graftwork_d3.compare import Distance, FullModel, binned
from graftwork_d3.flops import cost_of
from graftwork_d3.options import Layer, read_schedule
from graftwork_d3.policies import Plan
from graftwork_d3.schedule import DepthSchedule
from graftwork_d3.stack import find_decoder
from graftwork_d3.texts import Scored, TextOptions, answers_json, scored_texts

POLICIES = {
    "d3": "D3",
    "early_exit": "the last layers left out",
    "late_start": "the layers after the first left out",
    "even": "layers kept at even distances",
    "constant": "D3's layers left out, as many at every step",
    "reversed": "D3's schedule from back to front",
    "random": "layers in random orders",
}

# Agreement of all policies is in the charts and in fidelity.json; a table of all would not be read.
SHOWN = ("d3", "early_exit", "constant")

METRICS = {
    **{f"kl_{name}": f"{words}: KL(full || method), nats per token" for name, words in POLICIES.items()},
    **{f"agreement_{name}": f"{POLICIES[name]}: same first token as full" for name in SHOWN},
    "nll_full": "full model: NLL of the text, nats per token",
    "nll_d3": "D3: NLL of the text, nats per token",
    "entropy_fall": "full model: entropy of the text's first half minus that of its second, nats",
    "kl_random_best": "the best of the random orders: KL(full || method), nats per token",
    "depth": "mean share of the layers that a token goes through",
    "speedup_bound": "speed-up if time went with arithmetic",
}


class FidelityOptions(TextOptions):
    """Options of d3:fidelity."""

    ratios: list[float] = Field(
        [0.87],
        min_length=1,
        description="mean depths, as shares of the layers; metrics are those of the first, charts show all",
    )
    flex_start: int | None = Field(None, ge=1, description="as in the plugin's options")
    tail: int | None = Field(None, ge=1, description="as in the plugin's options")
    minimum: int | None = Field(None, ge=2, description="as in the plugin's options")
    order: Literal["from_start", "from_end", "spread"] | list[Layer] = Field(
        "from_start", description="as in the plugin's options"
    )
    config: str | None = Field(None, description="a d3.json, whose layers are taken; its decay is not")
    random_orders: int = Field(
        3, ge=1, description="random orders tried at the first of the ratios; one at the others"
    )
    bin: int = Field(16, ge=1, description="steps per point of the charts over positions")


def base_schedule(options: FidelityOptions, layers: int) -> DepthSchedule:
    """Return the schedule whose layers leave, at no decay yet.

    Raises:
        UserError: see :class:`DepthSchedule`; a config beside options that it brings.
    """
    named = {"flex_start", "tail", "minimum", "order"} & options.model_fields_set
    if options.config is not None:
        if named:
            raise UserError(
                f"benchmark.config brings the layers; remove benchmark.{min(named)}, or the config"
            )
        return read_schedule(Path(options.config), layers)
    return DepthSchedule.of(
        layers,
        alpha=1.0,
        start=options.flex_start,
        tail=options.tail,
        minimum=options.minimum,
        order=options.order,
    )


def whole_depth(ratio: float, schedule: DepthSchedule) -> int:
    """Return the number of layers nearest to ``ratio`` of all: constant depth meets it exactly.

    Raises:
        UserError: it is below the schedule's minimum, or above 1.
    """
    depth = round(ratio * schedule.layers)
    if not schedule.minimum <= depth <= schedule.layers or ratio > 1:
        raise UserError(
            f"benchmark.ratios: {ratio:g} of {schedule.layers} layers are {depth}, which is not between the minimum "
            f"{schedule.minimum} and {schedule.layers}"
        )
    return depth


def plans(schedule: DepthSchedule, steps: int, depth: int, random_orders: int) -> dict[str, list[Plan]]:
    """Return the plans of every policy for a text of ``steps`` steps."""
    return {
        "d3": [schedule],
        "early_exit": [policies.early_exit(schedule, steps)],
        "late_start": [policies.late_start(schedule, steps)],
        "even": [policies.even(schedule, steps)],
        "constant": [policies.constant(schedule, steps, depth)],
        "reversed": [policies.reversed_steps(schedule, steps)],
        "random": [policies.random_order(schedule, steps, seed) for seed in range(random_orders)],
    }


def measure(evaluation: Evaluation) -> Measurement:
    """Score every item under every policy at every budget. The run's plugins do not take part."""
    options: FidelityOptions = evaluation.options
    model = evaluation.model
    _, layers = find_decoder(model)
    base = base_schedule(options, len(layers))
    depths = [whole_depth(ratio, base) for ratio in options.ratios]
    texts = scored_texts(evaluation)
    items = [item for item in texts if len(item.answer) > 1]
    if not items:
        raise UserError("no answer has two tokens, so there is nothing to leave layers out of")
    # A budget is the mean over all tokens there are: step t counts as often as answers are that long.
    lengths = Counter(len(item.answer) - 1 for item in items)
    alive = [
        float(sum(n for size, n in lengths.items() if size >= step)) for step in range(1, max(lengths) + 1)
    ]
    schedules = [base.meeting(depth / base.layers, alive) for depth in depths]
    found, entropies, own = _score(evaluation, items, schedules, depths)
    return _measurement(evaluation, texts, items, schedules, alive, found, entropies, own)


Found = dict[str, list[list[list[Distance]]]]
"""Policy -> budget -> item -> plan."""


def _score(
    evaluation: Evaluation, items: list[Scored], schedules: list[DepthSchedule], depths: list[int]
) -> tuple[Found, list[torch.Tensor], list[torch.Tensor]]:
    options: FidelityOptions = evaluation.options
    found: Found = {name: [[] for _ in schedules] for name in POLICIES}
    entropies: list[torch.Tensor] = []
    own: list[torch.Tensor] = []
    with evaluation.console.bar(len(items), "score under every policy") as bar:
        for item in items:
            full = FullModel(evaluation.model, item)
            entropies.append(full.entropy())
            own.append(full.distance().nll)
            for budget, (schedule, depth) in enumerate(zip(schedules, depths, strict=True)):
                # The number of random orders matters for the metrics; the charts show one.
                draws = options.random_orders if budget == 0 else 1
                for name, many in plans(schedule, full.steps, depth, draws).items():
                    found[name][budget].append([full.distance(plan) for plan in many])
            bar.update(1)
    return found, entropies, own


def _mean_over_plans(many: list[Distance], field: str) -> torch.Tensor:
    return torch.stack([getattr(one, field) for one in many]).mean(0)


def _measurement(
    evaluation: Evaluation,
    texts: list[Scored],
    items: list[Scored],
    schedules: list[DepthSchedule],
    alive: list[float],
    found: Found,
    entropies: list[torch.Tensor],
    own: list[torch.Tensor],
) -> Measurement:
    options: FidelityOptions = evaluation.options
    ratios = [schedule.mean_ratio(alive) for schedule in schedules]

    def per_item(name: str, budget: int, field: str) -> list[float]:
        return [float(_mean_over_plans(many, field).mean()) for many in found[name][budget]]

    metrics: dict[str, list[float | None]] = {}
    for name in POLICIES:
        metrics[f"kl_{name}"] = [*per_item(name, 0, "kl")]
    for name in SHOWN:
        metrics[f"agreement_{name}"] = [*per_item(name, 0, "agree")]
    metrics["nll_full"] = [float(one.mean()) for one in own]
    metrics["nll_d3"] = [*per_item("d3", 0, "nll")]
    metrics["entropy_fall"] = [_fall(one) for one in entropies]
    cost = cost_of(evaluation.model, round(sum(len(one.prompt) for one in items) / len(items)))
    orders = [[float(one.kl.mean()) for one in many] for many in found["random"][0]]
    values: dict[str, float | None] = {
        "kl_random_best": min(sum(column) / len(column) for column in zip(*orders, strict=True)),
        "depth": ratios[0],
        "speedup_bound": cost.bound(ratios[0]),
    }
    table = [
        {"policy": name, "mean_depth_ratio": ratio, **{
            field: sum(per_item(name, budget, field)) / len(items) for field in ("kl", "agree", "nll")
        }}
        for budget, ratio in enumerate(ratios)
        for name in POLICIES
    ]  # fmt: skip
    return Measurement(
        items=metrics,
        values=values,
        charts=_charts(options, table, found, entropies),
        rows=[
            {"item": item.name, "steps": len(item.answer) - 1}
            | {name: column[k] for name, column in metrics.items()}
            for k, item in enumerate(items)
        ],
        files={
            "answers.json": answers_json(texts),
            "fidelity.json": {
                "schedules": [one.as_json() for one in schedules],
                "table": table,
                "entropy_by_step": binned(entropies, options.bin),
            },
        },
        notes=[
            *(
                f"mean depth {ratio:.3f} of {schedule.layers} layers (alpha {schedule.alpha:.5f}, layers leave as "
                f"{_words(schedule)}): at most {cost.bound(ratio):.2f} times as fast, as {cost.head_share:.0%} of a "
                f"token's arithmetic is the head's"
                for ratio, schedule in zip(ratios, schedules, strict=True)
            ),
            *([f"{len(texts) - len(items)} answers of one token are left out"] * (len(items) < len(texts))),
        ],
    )


def _words(schedule: DepthSchedule) -> str:
    if isinstance(schedule.order, tuple):
        return f"{', '.join(map(str, schedule.leaving))}"
    return f"{schedule.order} of {schedule.start} to {schedule.layers - schedule.tail - 1}"


def _fall(entropy: torch.Tensor) -> float | None:
    """Return how much lower the second half's mean is; None for a text of one step."""
    half = len(entropy) // 2
    return float(entropy[:half].mean() - entropy[half:].mean()) if half else None


def _charts(
    options: FidelityOptions, table: list[dict[str, Any]], found: Found, entropies: list[torch.Tensor]
) -> list[LineChart]:
    def against_depth(field: str) -> dict[str, list[tuple[float, float]]]:
        return {
            name: sorted((row["mean_depth_ratio"], row[field]) for row in table if row["policy"] == name)
            for name in POLICIES
        }

    def over_steps(field: str) -> dict[str, list[tuple[float, float]]]:
        return {
            name: binned([_mean_over_plans(many, field) for many in found[name][0]], options.bin)
            for name in POLICIES
        }

    depth, step = "mean depth (share of the layers)", "generated token"
    chosen = f"at mean depth {table[0]['mean_depth_ratio']:.2f}"
    charts = [
        LineChart(f"KL over positions, {chosen}", "Lower is nearer.", step, "KL, nats", over_steps("kl")),
        LineChart(
            f"Agreement over positions, {chosen}",
            "Share of tokens where method and full model put the same token first.",
            step,
            "agreement",
            over_steps("agree"),
        ),
        LineChart(
            "Entropy of the full model over positions",
            "D3 rests on later tokens being easier: this line should fall.",
            step,
            "entropy, nats",
            {"full model": binned(entropies, options.bin)},
        ),
    ]
    if len(options.ratios) == 1:
        return charts
    return [
        LineChart(
            "KL against mean depth",
            "How far next-token distributions are from the full model's. Lower is nearer.",
            depth,
            "KL, nats",
            against_depth("kl"),
        ),
        LineChart(
            "Agreement against mean depth",
            "Share of tokens where method and full model put the same token first.",
            depth,
            "agreement",
            against_depth("agree"),
        ),
        *charts,
    ]


FIDELITY = Benchmark(
    summary="nearness to the full model at equal mean depth: D3, early exit, even, constant, random, reversed",
    metrics=METRICS,
    measure=measure,
    options=FidelityOptions,
)
