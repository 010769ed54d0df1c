"""The benchmarks ``lm-eval:<task>[,<task>...]``: tasks of EleutherAI's lm-eval-harness, with plugins in use.

A task is one that lm-eval has (or a group or a tag), or a YAML file of yours. Likelihoods and answers both come
from the model as the plugins change it. Needs the extra ``graftwork[lm-eval]``.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from graftwork.errors import UserError, did_you_mean
from graftwork.hookspecs import Benchmark, Measurement

if TYPE_CHECKING:
    from graftwork.evaluate.benchmarks import Evaluation

EXTRA = "graftwork[lm-eval]"


class LmEvalOptions(BaseModel):
    """How the tasks are run."""

    model_config = ConfigDict(extra="forbid")

    limit: int | None = Field(None, ge=1, description="so many items of each task; all if not set")
    num_fewshot: int | None = Field(None, ge=0, description="examples in a prompt; the task's own if not set")
    chat: bool = Field(False, description="ask through the chat template; lm-eval leaves it out by default")
    batch_size: int = Field(8, ge=1, description="requests that are answered together")
    max_new_tokens: int = Field(256, ge=1, description="longest answer where the task does not say")


def benchmark(tasks: Sequence[str]) -> Benchmark:
    """Return the benchmark of ``tasks``, whose metrics are named ``<task>_<metric>``.

    Where a task has several filters of answers, their names follow. The tasks' data is read.

    Raises:
        UserError: lm-eval is not installed, no task is named, or one is not there or cannot be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"benchmarks of lm-eval need the extra: `pip install {EXTRA}`")
    if not tasks:
        raise UserError("'lm-eval:' names no task; write lm-eval:<task>[,<task>...]")
    names = tuple(tasks)
    return Benchmark(
        summary=f"lm-eval: {', '.join(names)}",
        metrics=dict(_metrics(names)),
        measure=lambda evaluation: measure(evaluation, names),
        options=LmEvalOptions,
    )


@functools.cache
def _manager() -> Any:
    """Return lm-eval's index of tasks, which takes seconds to read."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    return TaskManager()


def _load(names: Sequence[str]) -> dict[str, Any]:
    manager = _manager()
    for name in names:
        if not name.endswith((".yaml", ".yml")) and name not in manager.all_tasks:
            raise UserError(f"lm-eval has no task '{name}'{did_you_mean(name, manager.all_tasks)}")
    try:
        return manager.load(list(names))
    except Exception as error:
        # Data that is not there, a broken YAML file, a data set that the hub does not give: of any kind.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"lm-eval cannot load {', '.join(names)}: {lines[0]}") from error


@functools.cache
def _metrics(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return (name, words) of all metrics of tasks and groups."""
    loaded = _load(names)
    found: dict[str, str] = {}
    members: dict[str, Any] = {
        **{name: [task] for name, task in loaded["tasks"].items()},
        **{name: group.get_all_tasks() for name, group in loaded["groups"].items()},
    }
    for name, tasks in members.items():
        filters = list(dict.fromkeys(one.name for task in tasks for one in task._filters))
        several = len(filters) > 1
        for metric in dict.fromkeys(metric for task in tasks for metric in task.aggregation()):
            for kind in filters:
                key = metric_name(name, metric, kind, several)
                found[key] = f"{metric} of {name}" + (f" ({kind})" if several else "")
    return tuple(found.items())


def metric_name(task: str, metric: str, kind: str, several: bool) -> str:
    """Return a metric's name as claims write it: letters, digits and underscores."""
    parts = [task, metric, *([kind] if several else [])]
    name = re.sub(r"\W+", "_", "_".join(parts))
    return f"_{name}" if name[0].isdigit() else name


def measure(evaluation: Evaluation, names: Sequence[str]) -> Measurement:
    """Run the tasks.

    Raises:
        UserError: lm-eval refuses a task, or a plugin in use cannot take part.
    """
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]

    from graftwork.evaluate.answers import check_decoding
    from graftwork.evaluate.lm_eval_model import PluginLM

    options: LmEvalOptions = evaluation.options
    check_decoding(evaluation.decoding, "the requests of lm-eval")
    if options.chat and not evaluation.tokenizer.chat_template:
        raise UserError("benchmark.chat is on, and the model's tokenizer has no chat template; leave it off")
    model = PluginLM(
        evaluation.model,
        evaluation.tokenizer,
        evaluation.decoding,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        console=evaluation.console,
    )
    try:
        result: Any = simple_evaluate(
            model=model,
            tasks=list(names),
            task_manager=_manager(),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.chat,
            fewshot_as_multiturn=options.chat,
            # Intervals are drawn from the items, over both arms of a claim.
            bootstrap_iters=0,
        )
    except (ValueError, AssertionError) as error:
        raise UserError(f"lm-eval refuses {', '.join(names)}: {error}") from error
    return as_measurement(result, dict(_metrics(tuple(names))), model.cut)


def as_measurement(result: Mapping[str, Any], known: Mapping[str, str], cut: int) -> Measurement:
    """Return what lm-eval found: items where a metric is their mean, values elsewhere.

    ``known``: the metrics that tasks declare; of others a note tells the value. ``cut``: prompts that lost their
    beginning.
    """
    notes = [f"{cut} prompts did not fit the model's window and lost their beginning"] if cut else []
    values: dict[str, float | None] = {}
    items: dict[str, list[float | None]] = {}
    for name, found in {**result["results"], **result.get("groups", {})}.items():
        scores = {
            key: value
            for key, value in found.items()
            if "," in key and _is_number(value) and not key.partition(",")[0].endswith("_stderr")
        }
        several = len({key.partition(",")[2] for key in scores}) > 1
        for key, value in scores.items():
            metric, _, kind = key.partition(",")
            ours = metric_name(name, metric, kind, several)
            if ours not in known:
                notes.append(f"{name} does not declare its metric {metric} ({kind}), which was {value:.4g}")
                continue
            each = [
                sample.get(metric)
                for sample in sorted(result["samples"].get(name, []), key=lambda sample: sample["doc_id"])
                if sample["filter"] == kind
            ]
            if each and all(map(_is_number, each)) and math.isclose(math.fsum(each) / len(each), value):
                items[ours] = [float(one) for one in each]
            else:
                values[ours] = float(value)
    rows = [
        json.loads(
            json.dumps(
                {
                    "task": name,
                    "item": sample["doc_id"],
                    "filter": sample["filter"],
                    "target": sample["target"],
                    "answer": sample["filtered_resps"],
                    **{metric: sample.get(metric) for metric in sample["metrics"]},
                },
                default=str,
            )
        )
        for name, samples in result["samples"].items()
        for sample in samples
    ]
    return Measurement(items=items, values=values, rows=rows, notes=notes)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)
