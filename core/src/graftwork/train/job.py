"""Run one training job: a stream of one or more tasks, scored after each, resumable anywhere."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from datasets import disable_progress_bars
from transformers import PrinterCallback, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging as transformers_logging

from graftwork import memory
from graftwork.console import Console
from graftwork.data.stream import build_stream
from graftwork.data.tasks import Task
from graftwork.distributed import barrier
from graftwork.errors import PluginError, UserError
from graftwork.evaluate.perplexity import check_model
from graftwork.files import atomic_folder, write_json_atomic
from graftwork.hookspecs import TrainingAlgorithm
from graftwork.models import build_meta, load_model, load_tokenizer
from graftwork.plugins import Plugins
from graftwork.recipe import JobSpec
from graftwork.run import Run
from graftwork.train import deepspeed
from graftwork.train.adapters import AdapterStack, choose, count_parameters
from graftwork.train.algorithms import algorithm, build_arguments, check_fields, check_pairing, check_per_task
from graftwork.train.checkpoints import (
    CURRENT,
    STAGE,
    MarkCheckpoints,
    finished_stages,
    latest_checkpoint,
    load_plugin_states,
    read_json,
    save_plugin_states,
    stage_folder,
)
from graftwork.train.compose import Composition, compose
from graftwork.train.interference import Updates
from graftwork.train.progress import Progress
from graftwork.train.scores import Scores


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
    tokenizer = load_tokenizer(job.model.ref, trust_remote_code=job.model.trust_remote_code)
    tasks = build_stream(job.data, seed=job.seed, tokenizer=tokenizer, sources=plugins.data_sources(run))
    tasks = arranged(run, tasks)
    check_per_task(job.per_task, [task.name for task in tasks])
    scores = Scores(run, tasks, tokenizer, console)
    scores.check(plan.meta, plan.adapter)
    with run.locked():
        run.open(resume=resume, allow_other_versions=allow_other_versions)
        return _Stream(spec, run, plan, tasks, scores, console).execute()


def check_job(spec: JobSpec) -> None:
    """Refuse what can be refused about a job without reading weights, and check that its data is there.

    Raises:
        UserError: what is wrong, and what would be right.
    """
    run = Run(Path(), spec.job, Plugins.from_options(spec.job.plugins, where=f"{spec.where}: "))
    Plan.make(run)
    tasks = build_stream(spec.job.data, seed=spec.job.seed, sources=run.plugins.data_sources(run))
    tasks = arranged(run, tasks)
    check_per_task(spec.job.per_task, [task.name for task in tasks])


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

    def __init__(self, run: Run, chosen: TrainingAlgorithm, adapter: Any, meta: torch.nn.Module) -> None:
        self.run = run
        self.algorithm = chosen
        self.adapter = adapter
        self.meta = meta

    @classmethod
    def make(cls, run: Run) -> Plan:
        """Resolve everything and refuse what cannot work, on a model without weights."""
        run.plugins.call("check", run=run)
        from_plugin = run.plugins.call_one("training_algorithm", "a training algorithm", run=run)
        chosen = from_plugin[1] if from_plugin else algorithm(run.job.algorithm)
        for fields in ({}, *run.job.per_task.values()):
            check_fields(chosen.config, {**run.job.train, **fields})
        deepspeed.check(run.job.train)
        model = run.job.model
        meta = build_meta(model.ref, inline=model.config, trust_remote_code=model.trust_remote_code)
        if not from_plugin:
            check_pairing(run.job.algorithm, meta.config, run.job.data)
        if run.job.evaluate.general.text:
            check_model(meta.config)
        return cls(run, chosen, choose(run, meta), meta)


class _Stream:
    """One job in progress."""

    def __init__(
        self, spec: JobSpec, run: Run, plan: Plan, tasks: list[Task], scores: Scores, console: Console
    ) -> None:
        self.spec = spec
        self.run = run
        self.job = run.job
        self.plan = plan
        self.tasks = tasks
        self.console = console
        self.scores = scores
        self.tokenizer = scores.tokenizer
        self.train_seconds = 0.0
        self.statistics_seconds = 0.0
        self.state_bytes = 0
        self.adapter_bytes = 0
        self.updates = Updates(self.job.evaluate.interference)

    def execute(self) -> dict[str, Any]:
        memory.reset_peak()
        names = [task.name for task in self.tasks]
        done = finished_stages(self.run, names)
        arguments = self._arguments(0)
        model = self.job.model
        base = load_model(
            model.ref,
            dtype=model.dtype,
            attn_implementation=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
        ).to(arguments.device)
        self.stack = AdapterStack(self.plan.adapter, base, model.ref)
        current = self.tasks[len(done)].name if len(done) < len(self.tasks) else ""
        self.checkpoint = latest_checkpoint(self.run, current)
        if done:
            self._restore(done)
        if self.checkpoint:
            _, marker = self.checkpoint
            self.run.events.cut(marker["events"])
            self.scores.restore(marker["scores"], marker["eval_seconds"])
            self.train_seconds = marker["train_seconds"]
            self.updates.reason = marker["no_interference"]
        elif not done:
            self.run.events.cut(0)
            self.scores.before(self.stack)
        for task in self.tasks[len(done) :]:
            self._learn(task)
        return self._finish()

    # ------------------------------------------------------------------ one task

    def _learn(self, task: Task) -> None:
        self.stack.begin(task.name, self.run.seed + task.index)
        self.updates.begin(self.stack.model)
        trainer = self._trainer(task)
        with self._statistics():
            self.run.plugins.call("task_begin", run=self.run, task=task, trainer=trainer)
        trainer.attach(Composition.collect(self.run, self.stack.model))
        folder = None
        if self.checkpoint:
            (folder, marker), self.checkpoint = self.checkpoint, None
            load_plugin_states(self.run, folder)
            # The pass before the first step was in it already.
            self.statistics_seconds = marker["statistics_seconds"]
            self.console.say(f"resuming {task.name} at step {marker['step']}")
        else:
            self.run.events.write("task", task=task.name, index=task.index)
        self.started = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(folder) if folder else None)
        self.train_seconds += time.perf_counter() - self.started
        self.stack.forget_others()
        self.steps = trainer.state.global_step
        # Counted now: at a task's end a method may freeze or fold away what it has trained.
        self.trainable, self.total = count_parameters(self.stack.model)
        with self._statistics():
            self.run.plugins.call("task_end", run=self.run, task=task, trainer=trainer)
        self.updates.end(self.stack.model)
        # The stage holds everything from here on; optimizer state goes with the trainer.
        trainer.accelerator.free_memory()
        self.scores.after(task.index, self.stack)
        self._write_stage(task)

    @contextlib.contextmanager
    def _statistics(self) -> Iterator[None]:
        """Count the time that methods take around a task, such as for passes over its data."""
        started = time.perf_counter()
        yield
        self.statistics_seconds += time.perf_counter() - started

    def _trainer(self, task: Task) -> Any:
        dataset = task.train
        for plugin in self.run.plugins.implements("training_data"):
            replaced = self.run.plugins.call_on(
                plugin, "training_data", run=self.run, task=task, dataset=dataset
            )
            dataset = dataset if replaced is None else replaced
        arguments = self._arguments(task.index)
        trainer_class = compose(self.plan.algorithm.trainer)
        # The same seed for a task whether the run got here in one go or by resuming.
        set_seed(arguments.seed)
        with _readable_data_errors(task, self.stack.policy):
            trainer = trainer_class(
                model=self.stack.model,
                args=arguments,
                train_dataset=dataset,
                processing_class=self.tokenizer,
            )
        self._tell_lost_items(task, len(dataset), len(cast(Any, trainer.train_dataset)))
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress(self.run, task, self.console))
        trainer.add_callback(MarkCheckpoints(self.run, trainer, lambda: self._so_far(task)))
        self.stack.model = trainer.model
        return trainer

    def _tell_lost_items(self, task: Task, given: int, kept: int) -> None:
        """Say so where the trainer drops items: their prompts fill ``max_length``, nothing is left to learn."""
        if kept == 0:
            raise UserError(
                f"task '{task.name}' has no training item whose prompt is shorter than train.max_length; raise it, "
                f"or cut the prompts with data.max_words"
            )
        if kept < given and not self.job.train.get("packing"):
            note = (
                f"{task.name}: {given - kept} of {given} training items are left out, since their prompts fill "
                f"train.max_length; raise it, or cut the prompts with data.max_words"
            )
            task.notes.append(note)
            self.console.say(f"warning: {note}")

    def _so_far(self, task: Task) -> dict[str, Any]:
        """Return what a checkpoint inside ``task`` must remember of the stream."""
        return {
            "task": task.name,
            "scores": self.scores.to_json(),
            "eval_seconds": self.scores.seconds,
            "train_seconds": self.train_seconds + time.perf_counter() - self.started,
            "statistics_seconds": self.statistics_seconds,
            "no_interference": self.updates.reason,
        }

    def _arguments(self, index: int) -> Any:
        return build_arguments(
            self.plan.algorithm.config,
            {**self.job.train, **self.job.per_task.get(self.tasks[index].name, {})},
            output_dir=str(self.run.stages / CURRENT),
            seed=(self.job.seed + index) % 2**32,
        )

    # ------------------------------------------------------------------ stages

    def _write_stage(self, task: Task) -> None:
        folder = stage_folder(self.run, task.index, task.name)
        # Hooks may talk between processes, so all of them ask; only the main one writes.
        if self.run.main:
            with atomic_folder(folder) as building:
                self.stack.save(building / "model")
                self.adapter_bytes = self._adapter_bytes(building / "model")
                self.state_bytes = save_plugin_states(self.run, building)
                self.updates.save(building)
                record = {
                    "task": task.name,
                    "index": task.index,
                    "adapters": self.stack.names,
                    "events": self.run.events.position,
                    "train_seconds": self.train_seconds,
                    "statistics_seconds": self.statistics_seconds,
                    "eval_seconds": self.scores.seconds,
                    "steps": self.steps,
                    "trainable": self.trainable,
                    "total": self.total,
                    "state_bytes": self.state_bytes,
                    "adapter_bytes": self.adapter_bytes,
                    "no_interference": self.updates.reason,
                    "notes": task.notes,
                    "scores": self.scores.to_json(),
                }
                write_json_atomic(building / STAGE, record)
            shutil.rmtree(self.run.stages / CURRENT, ignore_errors=True)
            if self.plan.adapter is None and task.index > 0:
                # Full weights: only the newest stage keeps them, or a long stream would fill the disk.
                previous = stage_folder(self.run, task.index - 1, self.tasks[task.index - 1].name)
                shutil.rmtree(previous / "model", ignore_errors=True)
        else:
            self.run.plugins.call("save_state", run=self.run)
        barrier()

    def _adapter_bytes(self, folder: Path) -> int:
        """Return the size of all adapters that a stage keeps; 0 where it keeps the whole model."""
        if self.plan.adapter is None:
            return 0
        return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))

    def _restore(self, done: list[Path]) -> None:
        record = read_json(done[-1] / STAGE)
        assert record is not None
        self.console.say(f"resuming after task {record['task']} ({len(done)} of {len(self.tasks)} done)")
        if self.checkpoint is None:
            self.run.events.cut(record["events"])
        if self.plan.adapter is None:
            self._restore_full(done[-1])
        else:
            self.stack.load(done[-1] / "model", record["adapters"])
        load_plugin_states(self.run, done[-1])
        self.scores.restore(record["scores"], record["eval_seconds"])
        self.train_seconds = record["train_seconds"]
        self.statistics_seconds = record["statistics_seconds"]
        self.steps, self.trainable, self.total = record["steps"], record["trainable"], record["total"]
        self.state_bytes, self.adapter_bytes = record["state_bytes"], record["adapter_bytes"]
        self.updates.reason = record["no_interference"]
        for task, folder in zip(self.tasks, done, strict=False):
            # What was noted while it trained; what reading its data noted is among it.
            task.notes[:] = (read_json(folder / STAGE) or {})["notes"]

    def _restore_full(self, stage: Path) -> None:
        model = load_model(
            str(stage / "model"), dtype="auto", attn_implementation=self.job.model.attn_implementation
        )
        self.stack.model = model.to(self.stack.model.device)

    # ------------------------------------------------------------------ the end

    def _finish(self) -> dict[str, Any]:
        self.scores.finish(self.stack)
        output = self.run.directory / ("adapter" if self.plan.adapter else "model")
        if self.run.main:
            shutil.rmtree(output, ignore_errors=True)
            with atomic_folder(output) as building:
                self.stack.export(building)
                self.tokenizer.save_pretrained(str(building))
        result = {
            "name": self.spec.arm,
            "variant": self.spec.variant,
            "seed": self.job.seed,
            "plugins": self.job.plugins,
            "order": [task.name for task in self.tasks],
            "notes": [note for task in self.tasks for note in task.notes]
            + self.scores.notes()
            + self.updates.notes(),
            "charts": [
                dataclasses.asdict(chart)
                for _, charts in self.run.plugins.call("charts", run=self.run)
                for chart in charts
            ],
            **self.updates.result([stage_folder(self.run, task.index, task.name) for task in self.tasks]),
            **self.scores.result(),
            "trainable_parameters": self.trainable,
            "total_parameters": self.total,
            "extra_state_bytes": self.state_bytes,
            "adapter_bytes": self.adapter_bytes,
            "train_seconds": round(self.train_seconds, 3),
            "statistics_seconds": round(self.statistics_seconds, 3),
            "peak_memory_bytes": memory.peak_bytes(),
            "steps": self.steps,
            "output": output.name,
        }
        if self.run.main:
            write_json_atomic(self.run.result_path, result)
        barrier()
        return result


@contextlib.contextmanager
def _readable_data_errors(task: Task, policy: str) -> Iterator[None]:
    """Turn what a trainer class says about columns it does not find into a sentence about the data."""
    try:
        yield
    except KeyError as error:
        if error.args == ("default",) and policy != "shared":
            raise UserError(
                f"this trainer copies the adapter of the first task for its reference, which the policy "
                f"'{policy}' does not keep; train with an adapter of the policy 'shared'"
            ) from error
        columns = ", ".join(task.train.column_names)
        raise UserError(
            f"task '{task.name}': the trainer needs a column {error} that the data does not have "
            f"(it has: {columns}); the 'algorithm' and the data must fit"
        ) from error
