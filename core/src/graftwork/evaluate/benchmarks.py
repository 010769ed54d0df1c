"""Benchmarks: find one by its name, give it its options, measure, and keep what it found."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork import memory
from graftwork.console import Console
from graftwork.errors import PluginError, UserError, did_you_mean
from graftwork.files import write_json_atomic, write_text_atomic
from graftwork.hookspecs import Benchmark, Measurement
from graftwork.plugins import Plugins, construct, generation_notes
from graftwork.validation import first_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graftwork.generate.decoding import Decoding
    from graftwork.run import Run

LM_EVAL = "lm-eval"
ITEMS = "items.jsonl"


@dataclass(frozen=True)
class Evaluation:
    """What a benchmark gets.

    Attributes:
        run: the run with its job and plugins.
        model: in eval mode on its device, with its adapter.
        tokenizer: of the model.
        decoding: what the plugins in use bring to generation.
        options: the benchmark's own, validated (None where it has none).
        console: bars and lines for the user.
    """

    run: Run
    model: Any
    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding
    options: Any
    console: Console


def find_benchmark(run: Run, name: str) -> tuple[str, Benchmark]:
    """Return the owner (a plugin, or ``graftwork``) and the benchmark of that name.

    Names are ``qa``, ``lm-eval:<task>[,<task>...]`` and ``<plugin>:<benchmark>``.

    Raises:
        UserError: there is none, or its plugin is not installed.
    """
    first, colon, rest = name.partition(":")
    if first == LM_EVAL and colon:
        from graftwork.evaluate.lm_eval import benchmark

        return "graftwork", benchmark([task for task in rest.split(",") if task])
    if not colon:
        from graftwork.evaluate.qa import QA

        own = {"qa": QA}
        if name not in own:
            raise UserError(
                f"no benchmark '{name}'{did_you_mean(name, own)}; there are qa, lm-eval:<task> and "
                f"<plugin>:<benchmark>"
            )
        return "graftwork", own[name]
    owners = run.plugins
    if first not in owners:
        # It measures without taking part.
        owners = Plugins({first: construct(first, {})})
    offered = dict(owners.call_on(first, "benchmarks", run=run) or {})
    if rest not in offered:
        known = ", ".join(f"{first}:{one}" for one in offered) or "none"
        raise UserError(
            f"plugin '{first}' has no benchmark '{rest}'{did_you_mean(rest, offered)}; it has: {known}"
        )
    return first, offered[rest]


def benchmark_options(benchmark: Benchmark, given: Mapping[str, Any], where: str = "") -> Any:
    """Return the validated options of a benchmark, ``given`` being its section without ``name``.

    Raises:
        UserError: an unknown key, a wrong value, or options for a benchmark that has none.
    """
    from pydantic import ValidationError

    options = {key: value for key, value in given.items() if key != "name"}
    if benchmark.options is None:
        if options:
            raise UserError(
                f"{where}benchmark '{given['name']}' has no options, so no '{next(iter(options))}'"
            )
        return None
    try:
        return benchmark.options.model_validate(options)
    except ValidationError as error:
        problem = first_problem(error, benchmark.options)
        raise UserError(f"{where}benchmark '{given['name']}': {problem}") from None


def measure(
    run: Run, section: Mapping[str, Any], model: Any, tokenizer: Any, console: Console
) -> tuple[dict[str, Any], Measurement]:
    """Run the benchmark that ``section`` (``name`` and options) describes; return its result as JSON values.

    Raises:
        UserError: bad options or data.
        PluginError: the benchmark of a plugin failed.
    """
    from graftwork.generate.decoding import Decoding

    owner, benchmark = find_benchmark(run, section["name"])
    options = benchmark_options(benchmark, section)
    memory.reset_peak()
    started = time.perf_counter()
    evaluation = Evaluation(run, model, tokenizer, Decoding.from_plugins(run, model), options, console)
    try:
        found = benchmark.measure(evaluation)
    except (UserError, PluginError):
        raise
    except Exception as error:
        if owner == "graftwork":
            raise
        raise PluginError(owner, f"benchmark {section['name']}", error) from error
    unknown = sorted({*found.items, *found.values} - set(benchmark.metrics))
    if unknown:
        problem = ValueError(f"it measured '{unknown[0]}', which its metrics do not name")
        raise PluginError(owner, f"benchmark {section['name']}", problem)
    metrics = {**{name: _mean(values) for name, values in found.items.items()}, **found.values}
    result = {
        "benchmark": section["name"],
        "metrics": {name: metrics[name] for name in benchmark.metrics if name in metrics},
        "words": {name: words for name, words in benchmark.metrics.items() if name in metrics},
        "items": {name: list(values) for name, values in found.items.items()},
        "lines": [dataclasses.asdict(chart) for chart in found.charts],
        "notes": [*found.notes, *generation_notes(run)],
        "eval_seconds": round(time.perf_counter() - started, 3),
        "peak_memory_bytes": memory.peak_bytes(),
    }
    return result, found


def write_files(found: Measurement, folder: Path) -> list[Path]:
    """Write the rows and files of a measurement into ``folder``, each whole, and return where they are.

    Raises:
        UserError: a file name that would leave the folder; a place that cannot be written.
    """
    written = []
    for name, content in found.files.items():
        if Path(name).name != name:
            raise UserError(f"a benchmark's file is a plain name in its folder, not '{name}'")
        write_json_atomic(folder / name, content)
        written.append(folder / name)
    if found.rows:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows)
        write_text_atomic(folder / ITEMS, lines)
        written.append(folder / ITEMS)
    return written


def _mean(values: Any) -> float | None:
    known = [float(value) for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
