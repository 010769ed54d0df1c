"""``trainer train``, ``trainer transform``, ``trainer run`` and ``trainer report``."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from graftwork import expect
from graftwork.card import keep_result
from graftwork.console import Console
from graftwork.errors import UserError
from graftwork.files import told_when_not_written, write_json_atomic
from graftwork.plugins import find
from graftwork.recipe import JobSpec, Recipe, expand, with_outputs
from graftwork.recipes import locate
from graftwork.yaml_lines import Document, read

RESULTS = "results.json"
FEW_NOTES = 6
"""So many notes on a benchmark's runs are printed; the report has all, run by run."""


def train(
    model: str,
    data: str,
    algorithm: str,
    plugins: Sequence[str],
    sets: Sequence[str],
    output: str | None,
    resume: bool,
    allow_other_versions: bool,
    dry_run: bool,
    gpus: int | None = None,
) -> int:
    """Run one training job made from flags."""
    settings = {"model": model, "data": data, "algorithm": algorithm}
    recipe = expand(Document(settings, {}, "train"), sets=sets, plugins=plugins)
    return _execute(recipe, "train", output, resume, allow_other_versions, dry_run, gpus)


def transform(
    model: str,
    plugins: Sequence[str],
    sets: Sequence[str],
    output: str | None,
    resume: bool,
    allow_other_versions: bool,
    dry_run: bool,
) -> int:
    """Run one transform job made from flags."""
    settings = {"model": model, "transform": {}}
    recipe = expand(Document(settings, {}, "transform"), sets=sets, plugins=plugins)
    return _execute(recipe, "transform", output, resume, allow_other_versions, dry_run, None)


def run(
    recipe: str,
    size: str | None,
    steps: Sequence[str],
    plugins: Sequence[str],
    sets: Sequence[str],
    output: str | None,
    resume: bool,
    allow_other_versions: bool,
    dry_run: bool,
    gpus: int | None = None,
) -> int:
    """Run a recipe and judge its claims; return 0 where all held, else 1."""
    path = locate(recipe)
    expanded = expand(read(path), size=size, sets=sets, plugins=plugins, steps=steps)
    name = recipe.replace(":", "-") if not Path(recipe).exists() else path.stem
    # What was overridden says nothing about the recipe as it is shipped.
    shipped = None if Path(recipe).exists() or sets or plugins or steps else path
    return _execute(expanded, name, output, resume, allow_other_versions, dry_run, gpus, shipped)


def report(directory: str, markdown: bool) -> None:
    """Print the tables of a finished run and render its report again."""
    from graftwork.train.checkpoints import read_json

    root = Path(directory)
    results = read_json(root / RESULTS)
    if results is None:
        raise UserError(f"'{directory}' holds no finished run ({RESULTS} is missing or broken)")
    _tables(dict(results), markdown=markdown)
    _render(dict(results), root)


def _execute(
    recipe: Recipe,
    name: str,
    output: str | None,
    resume: bool,
    allow_other_versions: bool,
    dry_run: bool,
    gpus: int | None,
    shipped: Path | None = None,
) -> int:
    """Run all jobs of a recipe; ``shipped`` is its file where a plugin ships it and it is run as it is."""
    if gpus is not None and not dry_run:
        raise UserError(
            f"--gpus {gpus} is what --dry-run counts with; start a run on several GPUs with torchrun "
            f"--nproc_per_node {gpus} -m graftwork"
        )
    for plugin in dict.fromkeys(plugin for spec in recipe.jobs for plugin in spec.job.plugins):
        # Metadata only: a plugin that is not there is told at once, before torch is imported.
        find(plugin)
    names = [str(step["name"]) for step in recipe.source.get("steps") or []]
    measured = _metrics(recipe)
    # With --step, claims about steps that are left out cannot be judged; the others can.
    claims = [
        expect.parse(text, recipe.arms, measured)
        for text in recipe.expect
        if not expect.concerns(text, set(names) - set(recipe.arms))
    ]
    if dry_run:
        from graftwork.train.job import quiet_libraries
        from graftwork.train.plan import dry_run as describe

        quiet_libraries()
        for arm in recipe.arms:
            variants = [spec for spec in recipe.jobs if spec.arm == arm]
            if variants[0].job.transform is not None:
                from graftwork.transform.job import describe as describe_transform

                describe_transform(variants[0], [spec.variant for spec in variants])
                continue
            count = gpus or int(os.environ.get("WORLD_SIZE", "1"))
            describe(variants[0], [spec.variant for spec in variants], count)
        return 0
    if resume and output is None:
        raise UserError("--resume needs --output: the directory of the run to go on with")
    main = os.environ.get("RANK", "0") == "0"
    root = Path(output) if output else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    console = Console(enabled=main)
    jobs = _run_jobs(recipe, root, console, resume, allow_other_versions)
    from graftwork.distributed import leave

    leave()
    if not main:
        return 0
    results = _results(recipe, jobs, [expect.judge(claim, jobs) for claim in claims])
    write_json_atomic(root / RESULTS, results)
    if shipped is not None:
        keep_result(shipped, results, root)
    if output is None:
        _point_last(root)
    _tables(results)
    _render(results, root)
    return 0 if all(entry["verdict"] == "held" for entry in results["expect"]) else 1


def _metrics(recipe: Recipe) -> list[str]:
    """Return the names of all metrics that the recipe's benchmarks and transforms measure."""
    first = {spec.arm: spec for spec in reversed(recipe.jobs)}
    names: list[str] = []
    for spec in first.values():
        if spec.job.benchmark:
            from graftwork.evaluate.job import metric_names

            names += metric_names(spec)
        elif spec.job.transform is not None:
            from graftwork.transform.job import metric_names as transform_metrics

            names += transform_metrics(spec)
    return list(dict.fromkeys(names))


def _run_jobs(
    recipe: Recipe, root: Path, console: Console, resume: bool, allow_other_versions: bool
) -> list[dict[str, Any]]:
    from graftwork.run import LOCK, lock_folder
    from graftwork.train.job import quiet_libraries

    quiet_libraries()
    # Everything that can be refused is refused for all jobs before the first one costs an hour.
    checked: set[str] = set()
    for spec in recipe.jobs:
        # What reads an earlier step's output is checked when that is there.
        if spec.arm not in checked and not spec.needs:
            _check(spec)
            checked.add(spec.arm)
    if len(recipe.jobs) == 1:
        return [_one(recipe.jobs[0], root, console, resume, allow_other_versions)]
    jobs = []
    with lock_folder(root) if console.enabled else contextlib.nullcontext():
        # Asked by the main process only: it may have begun to write when the others come here.
        if console.enabled and not resume and any(entry.name != LOCK for entry in root.iterdir()):
            raise UserError(f"'{root}' is not empty; add --resume to go on with it, or name another --output")
        for number, spec in enumerate(recipe.jobs, 1):
            console.say(f"[{number}/{len(recipe.jobs)}] {spec.arm}  {spec.variant}")
            folder = root / spec.folder
            earlier = {(step, spec.variant): root / replace(spec, arm=step).folder for step in spec.needs}
            ready = with_outputs(spec, earlier)
            jobs.append(_one(ready, folder, console, resume and folder.exists(), allow_other_versions))
    return jobs


def _check(spec: JobSpec) -> None:
    from graftwork.evaluate.job import check_evaluation
    from graftwork.train.job import check_job
    from graftwork.transform.job import check_transform

    check = check_evaluation if spec.job.benchmark else check_job
    (check if spec.job.transform is None else check_transform)(spec)


def _one(spec: JobSpec, folder: Path, console: Console, resume: bool, allow: bool) -> dict[str, Any]:
    from graftwork.evaluate.job import run_evaluation
    from graftwork.run import Events
    from graftwork.train.job import run_job

    run = run_evaluation if spec.job.benchmark else run_job
    if spec.job.transform is not None:
        from graftwork.transform.job import run_transform

        run = run_transform
    with told_when_not_written(folder, "; --resume goes on from there"):
        result = run(spec, folder, console=console, resume=resume, allow_other_versions=allow)
    losses = [
        {
            key: value
            for key, value in event.items()
            if key == "task" or key == "step" or key.startswith("loss")
        }
        for event in Events(folder / "metrics.jsonl").read()
        if event["event"] == "log"
    ]
    return {**result, "losses": losses, "folder": folder.name}


def _results(recipe: Recipe, jobs: list[dict[str, Any]], verdicts: list[dict[str, str]]) -> dict[str, Any]:
    from graftwork.run import hardware, versions

    shown = [
        {key: value for key, value in job.items() if key not in ("items", "general_items")} for job in jobs
    ]
    return {
        "title": recipe.title,
        "size": recipe.size,
        "model": recipe.jobs[0].job.model.ref,
        "command": shlex.join(["trainer", *sys.argv[1:]]),
        "jobs": shown,
        "expect": verdicts,
        "hardware": hardware(),
        "versions": versions(),
        "notes": [],
    }


def _tables(results: dict[str, Any], markdown: bool = False) -> None:
    from graftwork.report import tables
    from graftwork.report.measured import measured

    jobs = results["jobs"]
    scored = [job for job in jobs if job["scores"]]
    groups = measured(jobs)
    if markdown:
        for members in groups.values():
            click.echo(tables.benchmark_markdown(members) + "\n")
        if len(jobs) > sum(map(len, groups.values())):
            click.echo(tables.comparison_markdown([job for job in jobs if not job.get("benchmark")]))
        if results["expect"]:
            click.echo("\n" + tables.expect_markdown(results))
        return
    for job in scored[:1] if len(scored) > 4 else scored:
        click.echo(f"\n{job['name']}  {job['variant']}")
        click.echo(tables.score_table(job))
    if scored:
        click.echo("\n" + tables.comparison_table([job for job in jobs if not job.get("benchmark")]))
    for benchmark, members in groups.items():
        click.echo(f"\n{benchmark}\n{tables.benchmark_table(members)}")
        notes = list(dict.fromkeys(note for job in members for note in job["notes"]))
        for note in notes[:FEW_NOTES]:
            click.echo(f"note: {note}")
        if len(notes) > FEW_NOTES:
            click.echo(f"note: {len(notes) - FEW_NOTES} more on single runs stand in the report")
    for job in jobs:
        if job["general"] and len(jobs) <= 8:
            click.echo(f"\n{job['name']}: general ability")
            click.echo(tables.general_table(job))
    if results["expect"]:
        click.echo("\n" + tables.expect_table(results))


def _render(results: dict[str, Any], root: Path) -> None:
    from graftwork.report.html import write_report

    write_report(results, root / "report.html")
    click.echo(f"\nreport:  {root / 'report.html'}")
    if len(results["jobs"]) == 1 and results["jobs"][0]["output"] != ".":
        click.echo(f"model:   {root / results['jobs'][0]['output']}")


def _point_last(root: Path) -> None:
    """Let ``runs/last`` name the newest run."""
    link = root.parent / "last"
    aside = root.parent / f".last-{os.getpid()}"
    # One of a process of the same number that was killed.
    aside.unlink(missing_ok=True)
    aside.symlink_to(root.name)
    aside.replace(link)
