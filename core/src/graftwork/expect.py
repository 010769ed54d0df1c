"""Claims: what a recipe's ``expect:`` lines say, and whether the results bear them out.

A claim compares two arms (``a.ap > b.ap``, with an optional margin ``+ 0.01`` and an optional factor,
``a.kl < 0.5 * b.kl``) or an arm with a number (``a.bwt > -0.05``). Accuracy metrics of two arms, and metrics
that a benchmark measured item by item, are compared by a paired bootstrap over runs and items; the claim
*held* where the interval lies above the margin, is *refuted* where it lies below, and *not decided* in
between. Everything else is compared by its mean over the variants.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from graftwork.errors import UserError, did_you_mean
from graftwork.evaluate.bootstrap import item_bootstrap, paired_bootstrap
from graftwork.evaluate.continual import METRICS
from graftwork.self_play.metrics import METRICS as SELF_PLAY

_SIDE = r"([A-Za-z0-9][\w-]*)\.([A-Za-z_][\w]*)"
_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_CLAIM = re.compile(
    rf"\s*{_SIDE}\s*(<=|>=|<|>)\s*(?:(?:({_NUMBER})\s*\*\s*)?{_SIDE}\s*(?:([-+])\s*(\d+(?:\.\d+)?))?|({_NUMBER}))\s*"
)

ITEM_METRICS = tuple(METRICS)
PLAIN_METRICS = (
    "unseen",
    "train_seconds",
    "statistics_seconds",
    "peak_memory_bytes",
    "trainable_parameters",
    "adapter_bytes",
    "extra_state_bytes",
)
Job = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """``arm.metric  relation  factor * other.other_metric + margin``, or the margin alone without ``other``."""

    text: str
    arm: str
    metric: str
    relation: str
    other: str | None
    other_metric: str | None
    margin: float
    factor: float = 1.0


def concerns(text: str, arms: Collection[str]) -> bool:
    """Return whether the claim is about one of ``arms``; False where it is not of a claim's form."""
    match = _CLAIM.fullmatch(text)
    return match is not None and (match[1] in arms or match[5] in arms)


def parse(text: str, arms: Sequence[str], measured: Sequence[str] = ()) -> Claim:
    """Return the claim that ``text`` states. ``measured``: metrics of the benchmarks that are run.

    Raises:
        UserError: it is not of the form above, or names an arm or metric that is not there.
    """
    match = _CLAIM.fullmatch(text)
    if not match:
        raise UserError(
            f"expect: '{text}' is not of the form 'arm.metric > arm.metric + 0.01' or 'arm.metric > 0.5'"
        )
    arm, metric, relation, factor, other, other_metric, sign, margin, number = match.groups()
    known = (*ITEM_METRICS, *PLAIN_METRICS, *SELF_PLAY, *measured)
    for name, values, what in (
        (arm, arms, "step"),
        (other, arms, "step"),
        (metric, known, "metric"),
        (other_metric, known, "metric"),
    ):
        if name is not None and name not in values:
            raise UserError(
                f"expect: '{text}': no {what} '{name}'{did_you_mean(name, values)}; known: {', '.join(values)}"
            )
    bound = float(number) if number else float(f"{sign}{margin}") if margin else 0.0
    return Claim(text, arm, metric, relation, other, other_metric, bound, float(factor or 1))


def judge(claim: Claim, jobs: Sequence[Job]) -> dict[str, str]:
    """Return ``{"text", "verdict", "detail"}`` for one claim."""
    mine = {job["variant"]: job for job in jobs if job["name"] == claim.arm}
    if claim.other is None:
        if mine and all(claim.metric in _items(job) for job in mine.values()):
            return _over_items(claim, [(_items(job)[claim.metric], None) for job in mine.values()])
        value = _mean([_value(job, claim.metric) for job in mine.values()])
        return _compared(claim, value, claim.margin, f"{claim.metric} = {_shown(value)}")
    theirs = {job["variant"]: job for job in jobs if job["name"] == claim.other}
    shared = [variant for variant in mine if variant in theirs]
    pairs = [
        (_items(mine[v]).get(claim.metric), _items(theirs[v]).get(str(claim.other_metric))) for v in shared
    ]
    if pairs and all(a and b and len(a) == len(b) for a, b in pairs):
        return _over_items(claim, pairs)
    # A factor compares means: a difference of scores has none.
    whole = claim.metric == claim.other_metric and claim.factor == 1
    if whole and claim.metric in ITEM_METRICS and shared:
        return _bootstrapped(claim, [(mine[v], theirs[v]) for v in shared])
    left = _mean([_value(job, claim.metric) for job in mine.values()])
    right = _mean([_value(job, str(claim.other_metric)) for job in theirs.values()])
    bound = None if right is None else claim.factor * right + claim.margin
    return _compared(claim, left, bound, f"{_shown(left)} against {_shown(right)}")


def _bootstrapped(claim: Claim, pairs: Sequence[tuple[Job, Job]]) -> dict[str, str]:
    orders = [a["order"] for a, _ in pairs]
    result = paired_bootstrap(
        [(a["items"], b["items"]) for a, b in pairs], metric=claim.metric, orders=orders
    )
    low, high, mean = result.low, result.high, result.difference
    verdict = result.verdict(cast(Any, claim.relation), claim.margin)
    detail = (
        f"difference {100 * mean:+.1f} points, 95 % interval [{100 * low:+.1f}, {100 * high:+.1f}], "
        f"{len(pairs)} paired run{'s' if len(pairs) > 1 else ''}"
    )
    return {"text": claim.text, "verdict": verdict, "detail": detail}


def _items(job: Job) -> Mapping[str, Sequence[float | None]]:
    """Return what a benchmark measured item by item; a stream of tasks has its own form."""
    return (job.get("items") or {}) if job.get("benchmark") else {}


def _over_items(claim: Claim, pairs: Sequence[Any]) -> dict[str, str]:
    """Judge by the items of a benchmark: A minus ``factor`` times B, or A alone where B is None."""
    found = item_bootstrap(pairs, factor=claim.factor)
    if found is None:
        return {"text": claim.text, "verdict": "not decided", "detail": "no item counts for both"}
    result, count = found
    verdict = result.verdict(cast(Any, claim.relation), claim.margin)
    what = claim.metric if claim.other is None else "difference"
    detail = (
        f"{what} {result.difference:.4g}, 95 % interval [{result.low:.4g}, {result.high:.4g}], {count} items"
        + (f", {len(pairs)} paired runs" if len(pairs) > 1 else "")
    )
    return {"text": claim.text, "verdict": verdict, "detail": detail}


_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def _compared(claim: Claim, left: float | None, right: float | None, detail: str) -> dict[str, str]:
    if left is None or right is None:
        return {"text": claim.text, "verdict": "not decided", "detail": "a value is missing"}
    verdict = "held" if _RELATIONS[claim.relation](left, right) else "refuted"
    return {"text": claim.text, "verdict": verdict, "detail": detail}


def _value(job: Job, metric: str) -> float | None:
    return job["metrics"].get(metric) if metric in job["metrics"] else job.get(metric)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _shown(value: float | None) -> str:
    return "nothing" if value is None else f"{value:.4g}"
