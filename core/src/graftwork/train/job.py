"""Run one training job: a stream of one or more tasks, scored after each, resumable anywhere."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging

from graftwork.console import Console
from graftwork.data.stream import build_stream
from graftwork.data.tasks import Task
from graftwork.errors import PluginError, UserError
from graftwork.evaluate.perplexity import check_model
from graftwork.hookspecs import SelfPlay, TrainingAlgorithm
from graftwork.models import build_meta, check_trainable, check_weights, load_tokenizer
from graftwork.plugins import Plugins
from graftwork.recipe import JobSpec
from graftwork.run import Run
from graftwork.self_play.check import check_self_play, self_play_algorithm
from graftwork.train import sharding
from graftwork.train.adapters import choose
from graftwork.train.algorithms import algorithm, check_fields, check_pairing, check_per_task
from graftwork.train.checkpoints import (
    read_json,
)
from graftwork.train.footprint import default
from graftwork.train.scores import Scores
from graftwork.train.stream import Stream


def run_job(
    spec: JobSpec,
    directory: Path,
    *,
    console: Console,
    resume: bool = False,
    allow_other_versions: bool = False,
) -> dict[str, Any]:
    """Run (or go on with) one job in ``directory`` and return its result, which is also written there.

    Raises:
        UserError: anything wrong with the input; raised before anything is written where it can be known.
    """
    job = spec.job
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    plugins = Plugins.from_options(job.plugins, where=f"{spec.where}: ")
    run = Run(directory, job, plugins, rank, world, console)
    finished = read_json(run.result_path)
    if finished is not None and resume:
        run.open(resume=True, allow_other_versions=allow_other_versions)
        return dict(finished)
    plan = Plan.make(run)
    sharding.check_processes(job.train, world)
    tokenizer = load_tokenizer(job.model.ref, trust_remote_code=job.model.trust_remote_code)
    tasks = build_stream(job.data, seed=job.seed, tokenizer=tokenizer, sources=plugins.data_sources(run))
    tasks = arranged(run, tasks)
    if plan.self_play is not None:
        make = _self_play(plan, tasks, tokenizer, console)
    else:
        make = _plain(plan, tasks, tokenizer, console)
    with run.locked():
        run.open(resume=resume, allow_other_versions=allow_other_versions)
        try:
            return make(spec).execute()
        finally:
            # Also where it was cut short: what shards it must not shard another job of this process.
            sharding.let_go()


def _plain(plan: Plan, tasks: list[Task], tokenizer: Any, console: Console) -> Callable[[JobSpec], Stream]:
    """Return what makes the stream of the tasks as they are, after checking that it can be run."""
    check_per_task(plan.run.job.per_task, [task.name for task in tasks])
    scores = Scores(plan.run, tasks, tokenizer, console)
    scores.check(plan.meta, plan.adapter)
    return lambda spec: Stream(spec, plan.run, plan, tasks, scores, console)


def _self_play(
    plan: Plan, tasks: list[Task], tokenizer: Any, console: Console
) -> Callable[[JobSpec], Stream]:
    """Return what makes the stream of iterations on the only task, after checking that it can be run."""
    from graftwork.self_play.held_out import HeldOut
    from graftwork.self_play.stream import (
        SelfPlayStream,
        held_out_items,
        iterations_of,
        only_task,
        scorer_for,
    )

    assert plan.self_play is not None
    run = plan.run
    owner, play = plan.self_play
    task = only_task(tasks)
    items = held_out_items(run.job, task, tokenizer)
    iterations = iterations_of(task, play.options.iterations)
    check_per_task(run.job.per_task, [one.name for one in iterations])
    scorer = scorer_for(run, tokenizer, run.job.train, play)
    held_out = HeldOut(run, iterations, tokenizer, console, items, scorer)
    return lambda spec: SelfPlayStream(spec, run, plan, iterations, play=play, owner=owner, held_out=held_out)


def _refuse_data(run: Run, player: str) -> None:
    """Self-play makes what is learned; training data beside it would be left out in silence."""
    bringing = run.plugins.implements("training_data")
    if bringing:
        raise UserError(
            f"plugins '{player}' and '{bringing[0]}' cannot be combined: the one makes the pairs that are learned "
            f"(hook self_play), and the other brings training data (hook training_data) that nobody would see; leave "
            f"one of them out"
        )


def check_job(spec: JobSpec) -> None:
    """Refuse what can be refused about a job without reading weights, and check that its data is there.

    Raises:
        UserError: what is wrong, and what would be right.
    """
    run = Run(Path(), spec.job, Plugins.from_options(spec.job.plugins, where=f"{spec.where}: "))
    plan = Plan.make(run)
    check_weights(spec.job.model.ref)
    tasks = build_stream(spec.job.data, seed=spec.job.seed, sources=run.plugins.data_sources(run))
    tasks = arranged(run, tasks)
    names = [task.name for task in tasks]
    if plan.self_play is not None:
        from graftwork.self_play.stream import iterations_of, only_task

        count = plan.self_play[1].options.iterations
        names = [task.name for task in iterations_of(only_task(tasks), count)]
    check_per_task(spec.job.per_task, names)


def quiet_libraries() -> None:
    """Leave the terminal to our own bars and lines; warnings stay, but for those to other libraries' authors."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate)\.")
    disable_progress_bars()
    transformers_logging.disable_progress_bar()


def arranged(run: Run, tasks: list[Task]) -> list[Task]:
    """Return the stream as the plugins want it (hook task_stream).

    Raises:
        PluginError: a plugin returned other tasks, which would not fill the same score matrix.
    """
    names = [task.name for task in tasks]
    for plugin in run.plugins.implements("task_stream"):
        chosen = run.plugins.call_on(plugin, "task_stream", run=run, tasks=tasks)
        if chosen is None:
            continue
        if [task.name for task in chosen] != names:
            raise PluginError(plugin, "task_stream", ValueError("it returned other tasks, or another order"))
        tasks = list(chosen)
    return tasks


class Plan:
    """What can be decided before weights are read: trainer class, its fields, the adapter."""

    def __init__(
        self,
        run: Run,
        chosen: TrainingAlgorithm,
        adapter: Any,
        meta: torch.nn.Module,
        self_play: tuple[str, SelfPlay] | None = None,
    ) -> None:
        self.run = run
        self.algorithm = chosen
        self.adapter = adapter
        self.meta = meta
        self.self_play = self_play

    @classmethod
    def make(cls, run: Run) -> Plan:
        """Resolve everything and refuse what cannot work, on a model without weights."""
        run.plugins.check(run)
        from_plugin = run.plugins.call_one("training_algorithm", run=run)
        play = run.plugins.call_one("self_play", run=run)
        if play and from_plugin:
            raise UserError(
                f"plugins '{play[0]}' and '{from_plugin[0]}' cannot be combined: the one learns by self-play "
                f"(hook self_play), which has its own trainer, the other brings a trainer (hook "
                f"training_algorithm); leave one of them out"
            )
        if play:
            _refuse_data(run, play[0])
            from_plugin = play[0], self_play_algorithm()
        chosen = from_plugin[1] if from_plugin else algorithm(run.job.algorithm)
        for fields in ({}, *run.job.per_task.values()):
            check_fields(chosen.config, {**run.job.train, **fields})
        sharding.check(run.job.train, run.plugins)
        checkpointing = bool(default(chosen.config, run.job.train, "gradient_checkpointing"))
        sharding.check_recomputation(run.job.train, checkpointing)
        model = run.job.model
        meta = build_meta(model.ref, inline=model.config, trust_remote_code=model.trust_remote_code)
        check_trainable(meta.config, model.ref)
        if not from_plugin:
            check_pairing(run.job.algorithm, meta.config, run.job.data)
        if run.job.evaluate.general.text:
            check_model(meta.config)
        adapter = choose(run, meta)
        run.plugins.call("check_adapter", run=run, adapter=adapter)
        if play:
            check_self_play(run, *play, adapter, meta)
        return cls(run, chosen, adapter, meta, play)
