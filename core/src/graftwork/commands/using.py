"""``trainer evaluate``: score a model, trained here or elsewhere."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from graftwork.console import Console
from graftwork.errors import UserError
from graftwork.files import write_json_atomic
from graftwork.plugins import Plugins
from graftwork.recipe import Job, expand
from graftwork.run import Run
from graftwork.yaml_lines import Document


def evaluate(
    model: str,
    data: str | None,
    text: str | None,
    plugins: Sequence[str],
    sets: Sequence[str],
    output: str | None,
    benchmark: str | None = None,
) -> None:
    """Score a model on tasks and texts, or by a benchmark; print a table and write JSON."""
    if benchmark:
        if data or text:
            given = "--data" if data else "--text"
            raise UserError(
                f"{given} is not for a benchmark, which reads what --set benchmark.data=... names; leave it out"
            )
        _benchmark(model, benchmark, plugins, sets, output)
        return
    from graftwork.data.stream import build_stream
    from graftwork.evaluate.answers import check_decoding, score_task
    from graftwork.evaluate.likelihood import check_plugins
    from graftwork.evaluate.perplexity import check_model, perplexity
    from graftwork.generate.decoding import Decoding
    from graftwork.models import load_config, load_tokenizer
    from graftwork.train.scores import candidates, check_labels, scoring_notes

    if not data and not text:
        raise UserError(
            "evaluate needs --data (tasks to score), --text (a text for its perplexity), or --benchmark"
        )
    if text and not Path(text).is_file():
        raise UserError(f"text file '{text}' does not exist")
    settings = {"model": model, "data": data or "none", "evaluate": {"cells": "final"}}
    job = expand(Document(settings, {}, "evaluate"), sets=sets, plugins=plugins).jobs[0].job
    tokenizer = load_tokenizer(job.model.ref, trust_remote_code=job.model.trust_remote_code)
    tasks = build_stream(job.data, seed=job.seed, tokenizer=tokenizer) if data else []
    if text:
        check_model(load_config(job.model.ref, trust_remote_code=job.model.trust_remote_code))
    console = Console()
    rows: list[dict[str, Any]] = []
    options = job.evaluate
    run, loaded = _loaded(job)
    decoding = Decoding.from_plugins(run, loaded)
    if tasks:
        check_decoding(decoding)
    if tasks and options.scoring == "likelihood":
        check_labels(tasks)
        check_plugins(run, loaded)
        for note in scoring_notes(tasks, options, "all tasks given"):
            console.say(note)
    for task in tasks:
        if task.test is None:
            raise UserError(f"task '{task.name}' has no test items to score")
        started = time.perf_counter()
        with console.bar(len(task.test), f"score {task.name}") as bar:
            score = score_task(
                loaded,
                tokenizer,
                task,
                scoring=options.scoring,
                # Which tasks the model has learned is not known here: all that were named count.
                candidates=candidates(task, tasks, options.candidates),
                batch_size=options.batch_size,
                max_new_tokens=options.max_new_tokens,
                decoding=decoding,
                progress=bar.update,
            )
        rows.append(
            {
                "task": task.name,
                "accuracy": score.accuracy,
                "invalid": score.invalid,
                "items": len(task.test),
                "scoring": score.scoring,
                "items_per_second": round(len(task.test) / (time.perf_counter() - started), 3),
            }
        )
    result: dict[str, Any] = {"model": model, "plugins": list(job.plugins), "tasks": rows}
    if text:
        with console.bar(None, "perplexity", "window") as bar:
            result["perplexity"] = perplexity(
                loaded,
                tokenizer,
                Path(text),
                window=job.evaluate.general.window,
                max_windows=job.evaluate.general.windows,
                progress=bar.update,
            )
    if rows:
        click.echo(f"{'TASK':<24} {'ACCURACY %':>10} {'INVALID %':>10} {'ITEMS':>6}")
        for row in rows:
            click.echo(
                f"{row['task']:<24} {100 * row['accuracy']:>10.1f} {100 * row['invalid']:>10.1f} {row['items']:>6}"
            )
    if text:
        value = result["perplexity"]
        click.echo(f"perplexity {value['perplexity']:.3f} over {value['tokens']} tokens of {text}")
    if output:
        write_json_atomic(Path(output), result)


def _benchmark(
    model: str, name: str, plugins: Sequence[str], sets: Sequence[str], output: str | None
) -> None:
    """Measure with one benchmark; ``output`` takes the JSON, and beside it go a page and what else is written."""
    from transformers import set_seed

    from graftwork.evaluate.benchmarks import measure, write_files
    from graftwork.evaluate.job import check_evaluation, load
    from graftwork.report.html import write_report
    from graftwork.report.tables import benchmark_table
    from graftwork.run import hardware, versions
    from graftwork.train.job import quiet_libraries

    quiet_libraries()
    settings = {"model": model, "benchmark": {"name": name}}
    spec = expand(Document(settings, {}, "evaluate"), sets=sets, plugins=plugins).jobs[0]
    check_evaluation(spec)
    console = Console()
    run = Run(Path(), spec.job, Plugins.from_options(spec.job.plugins), console=console)
    loaded, tokenizer = load(spec.job)
    set_seed(spec.job.seed)
    measured, found = measure(run, spec.job.benchmark or {}, loaded, tokenizer, console)
    job = {
        "name": "+".join(spec.job.plugins) or "plain",
        "variant": "",
        "plugins": spec.job.plugins,
        **measured,
    }
    click.echo(benchmark_table([job]))
    for note in measured["notes"]:
        click.echo(f"note: {note}")
    if not output:
        if found.files:
            click.echo(f"(with --output FILE.json it also writes {', '.join(found.files)})")
        return
    path = Path(output)
    write_json_atomic(path, {"model": model, "seed": spec.job.seed, **job, "versions": versions()})
    written = write_files(found, path.parent)
    page = path.with_suffix(".html")
    command = shlex.join(["trainer", *sys.argv[1:]])
    write_report(
        {
            "title": name,
            "model": model,
            "jobs": [{**job, "seed": spec.job.seed}],
            "command": command,
            "hardware": hardware(),
            "versions": versions(),
        },
        page,
    )
    for one in (path, page, *written):
        click.echo(f"wrote {one}")


def _loaded(job: Job) -> tuple[Run, Any]:
    from graftwork.models import load_for_use
    from graftwork.train.job import quiet_libraries

    quiet_libraries()
    run = Run(Path(), job, Plugins.from_options(job.plugins), console=Console())
    run.plugins.check(run)
    return run, load_for_use(job.model)[0]
