"""One stream of tasks: relevance, region and null space when a task begins; fold, moments and report when it ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from graftwork import AreaChart, UserError
from graftwork.data.texts import text_windows
from graftwork.distributed import rank_and_world
from graftwork.train.statistics import task_batches, trained_rows
from torch import nn

from graftwork_parsp.capacity import Capacity, capacities, charts
from graftwork_parsp.gradient import ProjectedRows
from graftwork_parsp.model import begin_region, fold, kept_share
from graftwork_parsp.moments import Collected, collect
from graftwork_parsp.neurons import Mlp, find_mlps
from graftwork_parsp.nullspace import Basis
from graftwork_parsp.options import ParspOptions
from graftwork_parsp.past import CALIBRATION, Past, estimate_bytes, fingerprint
from graftwork_parsp.regions import Region, map_regions, normalised
from graftwork_parsp.relevance import relevance

if TYPE_CHECKING:
    from graftwork.data.tasks import Task
    from graftwork.run import Run
    from transformers import Trainer

WINDOW = 128
MOMENT_ITEMS = 128
# Below these the report warns: directions left in a layer, and what the constraint leaves of Theta.
LEAST_FREE = 0.05
LEAST_KEPT = 0.1


class Stream:
    """What PaRSP keeps while a stream runs.

    Attributes:
        past: statistics of the tasks so far; None before the first task begins.
        projected: the constrained weights of the task at hand, with mode: gradient.
        layout: the model's MLPs as its shapes alone tell them, before weights are loaded.
    """

    def __init__(self, options: ParspOptions) -> None:
        self.options = options
        self.past: Past | None = None
        self.projected: ProjectedRows | None = None
        self.layout: list[Mlp] = []
        self.mlps: list[Mlp] = []
        self.shares: dict[str, torch.Tensor] = {}
        self.regions: dict[str, Region] = {}
        self.moment_items = 0
        self._fingerprint: torch.Tensor | None = None
        self._warnings: list[str] = []

    # ------------------------------------------------------------------ begin

    def begin(self, run: Run, task: Task, trainer: Trainer) -> None:
        """Measure relevance, choose the task's region, protect the past, and attach what trains.

        Nothing here draws from the global random state, and everything is the same when a run resumes.
        """
        model, options = cast(nn.Module, trainer.model), self.options
        self._warnings = []
        self._open(run, task, trainer)
        past = self._past
        self._count_tokens(run, task, trainer)
        batches = _batches(run, task, trainer, "relevance", options.relevance_items)
        self.shares = _shares(relevance(model, self.mlps, batches, task=task.name))
        draw = torch.Generator().manual_seed(run.seed * 1009 + task.index)
        self.regions = map_regions(
            self.shares,
            past.shares,
            density=options.density,
            h=options.h,
            select=options.select,
            generalist=options.generalist,
            used=past.used(self.mlps),
            budget=options.budget,
            exhausted=options.exhausted,
            generator=draw if options.rows == "random" else None,
            task=task.name,
        )
        cores = {name: region.core for name, region in self.regions.items()}
        bases = past.bases(options.eps, next(model.parameters()).device)
        column_bases = past.column_bases(options.eps, cores)
        self._tell_short(run, task)
        if options.mode == "gradient":
            self._constrain(model, trainer, bases)
        else:
            seed = run.seed * 1009 + task.index
            begin_region(model, cores, bases, column_bases=column_bases, seed=seed)

    @property
    def _past(self) -> Past:
        assert self.past is not None
        return self.past

    def _open(self, run: Run, task: Task, trainer: Trainer) -> None:
        model = cast(nn.Module, trainer.model)
        if not self.mlps:
            self.mlps = find_mlps(model, self.options.names)
            self._fingerprint = fingerprint(model, self.mlps)
        assert self._fingerprint is not None
        if self.past is None:
            self.past = Past(self._fingerprint)
            if self.options.calibration is not None:
                self._calibrate(run, trainer)
        self.past.check_base(self._fingerprint)

    def check_size(self, tasks: int) -> None:
        """Refuse a stream whose statistics would take more than ``state_limit_mib``.

        Raises:
            UserError: they would; names the options that make them smaller.
        """
        options = self.options
        limit = options.state_limit_mib
        count = tasks + (options.calibration is not None)
        needed = estimate_bytes(
            self.layout,
            count,
            moments=options.kept_moments,
            columns=options.kept_columns,
            size=options.sketch,
            density=options.density,
        )
        if limit is not None and needed > limit * 2**20:
            raise UserError(
                f"plugin 'parsp' would keep {needed / 2**20:.3g} MiB of statistics for {tasks} tasks, more than "
                f"plugins.parsp.state_limit_mib = {limit:g}; set plugins.parsp.moments: sketch, lower "
                f"plugins.parsp.sketch, or raise the limit"
            )

    def _calibrate(self, run: Run, trainer: Trainer) -> None:
        """Record the calibration text as a task before the first: it is protected, and counts in H."""
        options = self.options
        tokenizer = cast(Any, trainer.processing_class)
        text = Path(cast(str, options.calibration))
        windows = text_windows(text, tokenizer, WINDOW, options.calibration_windows)
        model = cast(nn.Module, trainer.model)
        device, size = trainer.args.device, _batch_size(trainer)
        shares = _shares(
            relevance(model, self.mlps, _window_batches(model, windows, size, device), task=CALIBRATION)
        )
        self._record(run, trainer, CALIBRATION, shares, {}, _window_batches(model, windows, size, device))

    def _count_tokens(self, run: Run, task: Task, trainer: Trainer) -> None:
        """Refuse a task that is too small for its moments before it is trained, and warn about a small one."""
        if not self.options.null_space:
            return
        width = max(mlp.inputs for mlp in self.mlps)
        self.moment_items, tokens = _items_for(trained_rows(trainer), 4 * width, self.options.moment_items)
        if tokens < width:
            raise UserError(
                f"task '{task.name}' has {tokens} tokens for the second moments of {width} inputs, and with fewer "
                f"tokens than inputs the null space is an artefact; give it more items, raise "
                f"plugins.parsp.moment_items, or set plugins.parsp.null_space: false"
            )
        if tokens < 4 * width:
            self._warn(
                run,
                task,
                f"{tokens} tokens for the second moments of {width} inputs are few; 4 per input are advised",
            )

    def _tell_short(self, run: Run, task: Task) -> None:
        short = self._past.short
        if short:
            self._warn(
                run,
                task,
                f"the sketch of {self.options.sketch} rows is too small to protect all but eps = {self.options.eps:g} "
                f"in {len(short)} layers, '{short[0]}' among them; raise plugins.parsp.sketch or eps",
            )

    def _constrain(self, model: nn.Module, trainer: Trainer, bases: Mapping[str, Basis]) -> None:
        self.projected = ProjectedRows(model, self.mlps, self.regions, bases)
        self.projected.freeze_others(model)
        if trainer.args.gradient_checkpointing:
            # Re-entrant checkpointing needs an input with a gradient, and the embeddings have none now.
            cast(Any, model).enable_input_require_grads()

    # ------------------------------------------------------------------ end

    def end(self, run: Run, task: Task, trainer: Trainer) -> None:
        """Fold the task in, take its moments with the trained model, and report what is left."""
        options = self.options
        kept = None
        if options.mode == "adapter":
            kept = kept_share(cast(nn.Module, trainer.model))
            fold(cast(nn.Module, trainer.model))
        self.projected = None
        batches = _batches(run, task, trainer, "moments", self.moment_items)
        cores = {name: region.core for name, region in self.regions.items()}
        self._record(run, trainer, task.name, self.shares, cores, batches)
        self._report(run, task, kept)

    def _record(
        self,
        run: Run,
        trainer: Trainer,
        name: str,
        shares: Mapping[str, torch.Tensor],
        cores: Mapping[str, torch.Tensor],
        batches: Iterator[dict[str, torch.Tensor]],
    ) -> None:
        past, options, model = self._past, self.options, cast(nn.Module, trainer.model)
        moments = Collected()
        if options.null_space:
            try:
                moments = collect(
                    model,
                    self.mlps,
                    batches,
                    moments=options.moments,
                    columns=options.kept_columns,
                    size=options.sketch,
                )
            except UserError as error:
                raise UserError(f"task '{name}': {error}") from error
        past.record(name, shares, cores, moments)
        bases = past.bases(options.eps, next(model.parameters()).device)
        past.taken.append({key: basis.k for key, basis in bases.items()})

    def _report(self, run: Run, task: Task, kept: float | None) -> None:
        layers = capacities(self.mlps, self._past, self.regions)
        free = min(layer.free for layer in layers)
        run.events.write(
            "capacity",
            task=task.name,
            used=_mean([layer.used for layer in layers]),
            overlap=_mean([layer.overlap for layer in layers]),
            directions=_mean([layer.directions for layer in layers]),
            free=_mean([layer.free for layer in layers]),
            least_free=free,
            entropy=_mean([layer.entropy for layer in layers]),
            generalist=_mean([layer.generalist for layer in layers]),
            kept=kept,
            state_bytes=self._past.nbytes,
            layers=[_row(layer) for layer in layers],
        )
        if free < LEAST_FREE:
            tightest = min(layers, key=lambda layer: layer.free)
            self._warn(
                run,
                task,
                f"only {free:.1%} of the input directions of '{tightest.layer}' are free for later tasks; raise "
                f"plugins.parsp.eps",
            )
        if kept is not None and kept < LEAST_KEPT:
            self._warn(
                run,
                task,
                f"the null space leaves {kept:.1%} of what was learned, almost nothing; raise plugins.parsp.eps",
            )
        for text in self._warnings:
            run.events.write("warning", task=task.name, text=text)

    def _warn(self, run: Run, task: Task, text: str) -> None:
        # Recorded when the task ends: a run that resumes inside a task begins it a second time.
        run.console.say(f"warning: {task.name}: {text}")
        self._warnings.append(text)

    # ------------------------------------------------------------------ state and charts

    def restore(self, past: Past) -> None:
        """Take back the statistics of a checkpoint.

        Raises:
            UserError: they belong to another base model.
        """
        if self._fingerprint is not None:
            past.check_base(self._fingerprint)
        self.past = past

    def charts(self) -> list[AreaChart]:
        """Return what each task took of every layer, also where a run that was resumed began none."""
        return charts(self.layout, self.past) if self.past is not None else []


def _shares(found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # In the precision that a checkpoint keeps, so that a resumed run sees the same numbers.
    return {name: normalised(value).float() for name, value in found.items()}


def _batches(
    run: Run, task: Task, trainer: Trainer, what: str, items: int | None
) -> Iterator[dict[str, torch.Tensor]]:
    return task_batches(
        trainer,
        items=items,
        batch_size=_batch_size(trainer),
        console=run.console,
        label=f"{what} {task.name}",
    )


def _batch_size(trainer: Trainer) -> int:
    """Return items per pass: one where checkpointing says that memory is scarce, since these passes have none."""
    return 1 if trainer.args.gradient_checkpointing else min(trainer.args.per_device_train_batch_size, 8)


def _items_for(dataset: Any, tokens: int, fixed: int | None) -> tuple[int, int]:
    """Return how many items of ``dataset`` the moments are taken on, and how many tokens those have.

    As many as ``fixed``, or until there are ``tokens`` tokens and :data:`MOMENT_ITEMS` items. In an encoder-decoder
    the shorter of prompt and answer counts.
    """
    total = 0
    limit = len(dataset) if fixed is None else min(fixed, len(dataset))
    for index in range(limit):
        if fixed is None and index >= MOMENT_ITEMS and total >= tokens:
            return index, total
        row = dataset[index]
        total += min(len(row[key]) for key in ("input_ids", "labels") if key in row)
    return limit, total


def _window_batches(
    model: nn.Module, windows: torch.Tensor, size: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this process's share of ``windows`` (n x 128); an encoder-decoder reads one half and predicts the other."""
    rank, world = rank_and_world()
    for ids in windows[rank::world].to(device).split(size):
        if cast(Any, model).config.is_encoder_decoder:
            ids, labels = ids.chunk(2, 1)
        else:
            labels = ids
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _row(layer: Capacity) -> dict[str, Any]:
    return {
        "layer": layer.layer,
        "used": layer.used,
        "overlap": layer.overlap,
        "directions": layer.directions,
    }
