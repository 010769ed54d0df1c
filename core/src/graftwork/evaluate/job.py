"""Run one evaluation job of a recipe: a benchmark on a model with plugins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import set_seed

from graftwork.console import Console
from graftwork.errors import UserError
from graftwork.evaluate.benchmarks import benchmark_options, find_benchmark, measure, write_files
from graftwork.files import write_json_atomic
from graftwork.models import check_weights, load_config, load_for_use
from graftwork.plugins import Plugins
from graftwork.recipe import Job, JobSpec
from graftwork.run import Run
from graftwork.train.checkpoints import read_json


def metric_names(spec: JobSpec) -> list[str]:
    """Return the metrics of the benchmark that ``spec`` measures with.

    Raises:
        UserError: there is no such benchmark.
    """
    run = Run(Path(), spec.job, Plugins.from_options(spec.job.plugins, where=f"{spec.where}: "))
    _, benchmark = find_benchmark(run, (spec.job.benchmark or {})["name"])
    return list(benchmark.metrics)


def check_evaluation(spec: JobSpec) -> None:
    """Refuse what can be refused before weights are read.

    Raises:
        UserError: an unknown benchmark or option, a plugin that refuses the job, a model that is not there.
    """
    run = Run(Path(), spec.job, Plugins.from_options(spec.job.plugins, where=f"{spec.where}: "))
    run.plugins.check(run)
    section = spec.job.benchmark or {}
    _, benchmark = find_benchmark(run, section["name"])
    benchmark_options(benchmark, section, f"{spec.where}: ")
    asked = spec.job.model
    load_config(asked.ref, inline=asked.config, trust_remote_code=asked.trust_remote_code)
    check_weights(asked.ref)


def run_evaluation(
    spec: JobSpec,
    directory: Path,
    *,
    console: Console,
    resume: bool = False,
    allow_other_versions: bool = False,
) -> dict[str, Any]:
    """Run one evaluation job in ``directory`` and return its result, which is also written there.

    A job that was cut off begins again: it has written nothing yet.

    Raises:
        UserError: anything wrong with the input.
    """
    job = spec.job
    run = Run(directory, job, Plugins.from_options(job.plugins, where=f"{spec.where}: "), console=console)
    finished = read_json(run.result_path)
    if finished is not None and resume:
        run.open(resume=True, allow_other_versions=allow_other_versions)
        return dict(finished)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"step '{spec.arm}' is a benchmark, which runs in one process; start it without torchrun"
        )
    check_evaluation(spec)
    with run.locked():
        run.open(resume=resume, allow_other_versions=allow_other_versions)
        model, tokenizer = load(job)
        set_seed(job.seed)
        measured, found = measure(run, job.benchmark or {}, model, tokenizer, console)
        write_files(found, directory)
        result = {
            "name": spec.arm,
            "variant": spec.variant,
            "seed": job.seed,
            "plugins": job.plugins,
            "order": [],
            "scores": [],
            "general": {},
            "charts": [],
            **measured,
            "output": ".",
        }
        write_json_atomic(run.result_path, result)
    return result


def load(job: Job) -> tuple[Any, Any]:
    """Return the model of a job, in eval mode on the accelerator where there is one, and its tokenizer."""
    return load_for_use(job.model)
