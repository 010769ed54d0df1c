"""One training job in progress: a stream of tasks, each learned, scored and kept as a stage."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset
from transformers import PrinterCallback, set_seed
from transformers.trainer_callback import ProgressCallback

from graftwork import memory
from graftwork.compat.trainer import TOKENS
from graftwork.console import Console
from graftwork.data.tasks import Task
from graftwork.distributed import barrier
from graftwork.errors import UserError
from graftwork.files import atomic_folder, discard, write_json_atomic
from graftwork.models import load_chosen, load_model
from graftwork.recipe import JobSpec
from graftwork.run import Run
from graftwork.train import sharding
from graftwork.train.adapters import AdapterStack, count_parameters
from graftwork.train.algorithms import build_arguments
from graftwork.train.checkpoints import (
    CURRENT,
    STAGE,
    MarkCheckpoints,
    finished_stages,
    latest_checkpoint,
    load_plugin_states,
    read_json,
    refused_pickles,
    save_plugin_states,
    stage_folder,
)
from graftwork.train.compose import Composition, compose
from graftwork.train.interference import Updates
from graftwork.train.progress import Progress

if TYPE_CHECKING:
    from graftwork.train.job import Plan
    from graftwork.train.scores import Scores


class Stream:
    """A job that learns its tasks one after another."""

    kept_models = 1
    """Stages that keep their model where whole weights are trained; the adapters of all stages are kept."""

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
        self.sharding = sharding.kind_of(self.job.train)

    def execute(self) -> dict[str, Any]:
        memory.reset_peak()
        names = [task.name for task in self.tasks]
        done = finished_stages(self.run, names)
        self.device = self._arguments(0).device
        sharding.let_go()
        self.stack = AdapterStack(self.plan.adapter, self._base(), self.job.model.ref)
        current = self.tasks[len(done)].name if len(done) < len(self.tasks) else ""
        self.checkpoint = latest_checkpoint(self.run, current)
        self._tidy(len(done))
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

    def _base(self) -> Any:
        """Load the model that the job names."""
        return load_chosen(self.job.model).to(self.device)

    def _tidy(self, done: int) -> None:
        """Remove what a run that was cut off just behind a stage had no time to."""
        barrier()
        if self.run.main:
            if self.checkpoint is None:
                shutil.rmtree(self.run.stages / CURRENT, ignore_errors=True)
            for index in range(done):
                self._forget_model(index - self.kept_models)

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
            if hasattr(trainer, TOKENS):
                setattr(trainer, TOKENS, marker.get("tokens", 0))
            self.console.say(f"resuming {task.name} at step {marker['step']}")
        else:
            self.run.events.write("task", task=task.name, index=task.index)
        self.started = time.perf_counter()
        try:
            with refused_pickles(folder):
                trainer.train(resume_from_checkpoint=str(folder) if folder else None)
        except Exception:
            # A checkpoint that was not written whole; where the disk is full it takes up room.
            latest_checkpoint(self.run, task.name)
            raise
        self.train_seconds += time.perf_counter() - self.started
        sharding.let_go()
        self.stack.forget_others()
        if self.sharding in ("zero3", "fsdp2"):
            self._make_whole(trainer)
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

    def _make_whole(self, trainer: Any) -> None:
        """Put a whole model in place of the sharded one, which ends with its trainer."""
        sharded = self.stack.model
        self.stack.put_on(self._base())
        sharding.gather(sharded, self.stack.model)
        trainer.model = trainer.model_wrapped = self.stack.model

    @contextlib.contextmanager
    def _statistics(self) -> Iterator[None]:
        """Count the time that methods take around a task, such as for passes over its data."""
        started = time.perf_counter()
        yield
        self.statistics_seconds += time.perf_counter() - started

    def _trainer(self, task: Task) -> Any:
        dataset = self.dataset(task)
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
        sharding.check_active(self.sharding, trainer)
        self._tell_lost_items(task, len(dataset), len(cast(Any, trainer.train_dataset)))
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress(self.run, task, self.console))
        trainer.add_callback(MarkCheckpoints(self.run, trainer, lambda: self._so_far(task)))
        self.stack.model = trainer.model
        return trainer

    def dataset(self, task: Task) -> Dataset:
        """Return what ``task`` is trained on."""
        dataset = task.train
        for plugin in self.run.plugins.implements("training_data"):
            replaced = self.run.plugins.call_on(
                plugin, "training_data", run=self.run, task=task, dataset=dataset
            )
            dataset = dataset if replaced is None else replaced
        return dataset

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
            self._forget_model(task.index - self.kept_models)
        else:
            self.run.plugins.call("save_state", run=self.run)
        barrier()

    def _forget_model(self, index: int) -> None:
        """Full weights: only the newest stages keep them, or a long stream would fill the disk."""
        if self.plan.adapter is None and index >= 0:
            discard(stage_folder(self.run, index, self.tasks[index].name) / "model")

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

    def _more_results(self) -> dict[str, Any]:
        """Return what a kind of stream adds to the result."""
        return {}

    def _finish(self) -> dict[str, Any]:
        self.scores.finish(self.stack)
        output = self.run.directory / ("adapter" if self.plan.adapter else "model")
        if self.run.main:
            shutil.rmtree(output, ignore_errors=True)
            card = stage_folder(self.run, self.tasks[-1].index, self.tasks[-1].name) / "model/README.md"
            with atomic_folder(output) as building:
                self.stack.export(building)
                if card.is_file():
                    # With what the trainer put there; where none was needed since a resume, there was no trainer.
                    shutil.copyfile(card, building / card.name)
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
            **self._more_results(),
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
