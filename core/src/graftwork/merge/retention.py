"""Retention: how much of each expert a merge has kept, on the expert's own tasks.

With s_i the score of the weights that stand for expert i, e_i of the expert itself and b_i of the base, on the same
test items:

    retention            1/N sum_i s_i / e_i
    retention_min        min_i s_i / e_i
    retention_above_base 1/N sum_i (s_i - b_i) / (e_i - b_i)

Settings are chosen from a grid by the mean score on validation items, the same ones for every method.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graftwork.data.options import DataOptions
from graftwork.errors import UserError
from graftwork.hookspecs import Benchmark, LineChart, Measurement
from graftwork.merge.experts import Experts
from graftwork.merge.method import MergeMethod
from graftwork.merge.options import MergeOptions
from graftwork.merge.scoring import Questions, ScoringOptions, questions
from graftwork.merge.standing import Standing
from graftwork.merge.threads import one_thread
from graftwork.transform.source import CheckpointSource
from graftwork.validation import first_problem

if TYPE_CHECKING:
    from graftwork.evaluate.benchmarks import Evaluation
    from graftwork.run import Run

Make = Callable[[Any, int], MergeMethod]
_METRICS = {
    "retention": "score of what stands for an expert over the expert's own, mean over experts",
    "retention_min": "the same of the expert that has lost most",
    "retention_above_base": "the same with the base's score taken off both, mean over experts",
    "bits_per_weight_per_expert": "all that is kept to serve all experts, per merged weight and expert",
}


class ExpertTasks(BaseModel):
    """One expert and what it is good at."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, description="model or LoRA adapter that was made from the base")
    tasks: list[str] | None = Field(
        None, min_length=1, description="tasks of the data that it is scored on; all where not named"
    )
    data: DataOptions | None = Field(None, description="its own data, in place of the benchmark's")


class RetentionOptions(ScoringOptions):
    """Options of the retention benchmark; the base is the job's model."""

    experts: dict[str, ExpertTasks] = Field(
        min_length=1, description="name: model and tasks, of every expert"
    )
    grid: dict[str, list[Any]] = Field(
        {}, description="option of the method: values to choose from on validation items"
    )
    merge: MergeOptions = Field(default_factory=lambda: MergeOptions.model_validate({}))


def retention_benchmark(run: Run, options: Any, make: Make) -> Benchmark:
    """Return the benchmark of a merge.

    Args:
        run: whose benchmark section names the experts, for the metrics' names.
        options: of the method's plugin (a pydantic model); the grid replaces some of them.
        make: from options and seed to the method.
    """
    section = run.job.benchmark or {}
    names = sorted(section["experts"]) if isinstance(section.get("experts"), dict) else []
    per_expert = {}
    for name in names:
        per_expert |= {
            f"score_{name}": f"share of right answers (or first tokens) on the tasks of '{name}'",
            f"expert_{name}": f"the same of '{name}' itself",
            f"base_{name}": "the same of the base",
        }
    return Benchmark(
        summary="how much of each expert a merge has kept, on the expert's own tasks",
        metrics={**_METRICS, **per_expert},
        measure=lambda evaluation: _measure(evaluation, options, make),
        options=RetentionOptions,
    )


def _measure(evaluation: Evaluation, options: Any, make: Make) -> Measurement:
    asked: RetentionOptions = evaluation.options
    job, seed = evaluation.run.job, evaluation.run.seed
    if hasattr(evaluation.model, "peft_config"):
        raise UserError(f"model '{job.model.ref}' is an adapter; experts are compared with a whole model")
    source = CheckpointSource(
        job.model.ref, dtype=job.model.dtype, trust_remote_code=job.model.trust_remote_code
    )
    experts = Experts({name: one.model for name, one in asked.experts.items()}, source, asked.merge)
    tasks = {
        name: (asked.experts[name].data or asked.data, asked.experts[name].tasks) for name in experts.names
    }
    test = questions(asked, tasks, evaluation.run, evaluation.tokenizer, validation=False)
    notes = [*experts.notes, *experts.survey(evaluation.console)]
    standing = Standing(evaluation.model, experts)
    points = [
        dict(zip(asked.grid, values, strict=True)) for values in itertools.product(*asked.grid.values())
    ]
    settings = {str(point): _with(options, point) for point in points}
    chosen, tried = points[0], []
    if len(points) > 1:
        tuning = questions(asked, tasks, evaluation.run, evaluation.tokenizer, validation=True)
        notes += tuning.notes
        for number, point in enumerate(points, 1):
            evaluation.console.say(f"[{number}/{len(points)}] {point}")
            method = make(settings[str(point)], seed)
            scores = _scores(evaluation, standing, method, tuning)
            tried.append({**point, "score": _mean([_mean(values) for values in scores.values()])})
        best = max(range(len(points)), key=lambda index: tried[index]["score"])
        chosen = points[best]
        notes.append(f"chosen on {asked.validation} validation items per task: {chosen}")
    method = make(settings[str(chosen)], seed)
    scores = _scores(evaluation, standing, method, test)
    dtype = job.model.dtype
    base = {
        name: test.reference(
            job.model.ref, dtype, evaluation.model, evaluation.tokenizer, name, evaluation.console
        )
        for name in experts.names
    }
    own = {
        name: test.reference(ref, dtype, None, evaluation.tokenizer, name, evaluation.console)
        for name, ref in zip(experts.names, experts.refs, strict=True)
    }
    bits = method.bits_per_weight(experts) / len(experts.names)
    return _measured(scores, own, base, bits, notes, chosen, tried)


def _scores(
    evaluation: Evaluation, standing: Standing, method: MergeMethod, asked: Questions
) -> dict[str, list[float]]:
    """Return the scores of what stands for each expert on its tasks."""
    experts, console = standing.experts, evaluation.console
    method.check(experts)
    with one_thread():
        method.begin(experts, console)

    def score(name: str) -> list[float]:
        return asked.score(standing.model, evaluation.tokenizer, name, console, f"score {name}")

    if not method.routes:
        with standing.showing(method, None, console):
            return {name: score(name) for name in experts.names}
    found = {}
    for index, name in enumerate(experts.names):
        with standing.showing(method, index, console):
            found[name] = score(name)
    return found


def _measured(
    scores: Mapping[str, Sequence[float]],
    own: Mapping[str, Sequence[float]],
    base: Mapping[str, Sequence[float]],
    bits: float,
    notes: list[str],
    chosen: Mapping[str, Any],
    tried: Sequence[Mapping[str, Any]],
) -> Measurement:
    """Return metrics and items of scores by expert."""
    total, count = sum(map(len, scores.values())), len(scores)
    items: dict[str, list[float | None]] = {}
    values: dict[str, float | None] = {"bits_per_weight_per_expert": bits}
    kept: list[float | None] = []
    above: list[float | None] = []
    ratios: list[float] = []
    for name, mine in scores.items():
        s, e, b = _mean(mine), _mean(own[name]), _mean(base[name])
        items[f"score_{name}"], items[f"expert_{name}"] = list(mine), list(own[name])
        items[f"base_{name}"] = list(base[name])
        # Weighted so that the mean over all items is the mean over experts.
        weight = total / (count * len(mine))
        kept += [one * weight / e if e else None for one in mine]
        gain = e - b
        above += [
            (one - other) * weight / gain if gain > 0 else None
            for one, other in zip(mine, base[name], strict=True)
        ]
        if e:
            ratios.append(s / e)
        if gain <= 0:
            notes.append(f"expert '{name}' ({e:.3f}) is no better than the base ({b:.3f}) on its own tasks")
    whole = all(value is not None for value in kept)
    if whole:
        items["retention"] = kept
        values["retention_min"] = min(ratios)
    if all(value is not None for value in above):
        items["retention_above_base"] = above
    rows = [
        {"expert": name, "item": number, "score": one, "own": own[name][number], "base": base[name][number]}
        for name, mine in scores.items()
        for number, one in enumerate(mine)
    ]
    files = {"chosen.json": {"chosen": dict(chosen), "tried": [dict(one) for one in tried]}} if tried else {}
    return Measurement(items, values, _charts(tried), rows, files, notes)


def _charts(tried: Sequence[Mapping[str, Any]]) -> list[LineChart]:
    """Draw scores over a grid of one number."""
    keys = [key for key in tried[0] if key != "score"] if tried else []
    if len(keys) != 1 or not all(isinstance(one[keys[0]], int | float) for one in tried):
        return []
    points = [(float(one[keys[0]]), one["score"]) for one in tried]
    caption = "Mean over experts of the share of right answers, on validation items."
    return [LineChart(f"choice of {keys[0]}", caption, keys[0], "score", {"validation": points})]


def _with(options: Any, point: Mapping[str, Any]) -> Any:
    """Return the options with a point of the grid in them."""
    kind = type(options)
    try:
        return kind.model_validate({**options.model_dump(), **point})
    except ValidationError as error:
        raise UserError(f"benchmark.grid: {first_problem(error, kind)}") from None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
