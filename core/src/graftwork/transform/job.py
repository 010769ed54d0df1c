"""Run one transform job of a recipe: change a model's weights, write the checkpoint, measure before and after."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from graftwork import memory
from graftwork.console import Console
from graftwork.distributed import barrier, from_main, started, together
from graftwork.errors import UserError
from graftwork.files import discard, write_json_atomic
from graftwork.hookspecs import WeightTransform
from graftwork.merge.experts import HELD
from graftwork.merge.opening import merging_of, open_experts, stored_beside
from graftwork.models import load_config, load_tokenizer, resolve
from graftwork.plugins import Plugins, load_class
from graftwork.recipe import Job, JobSpec, ModelOptions
from graftwork.run import Run
from graftwork.train.checkpoints import read_json
from graftwork.transform import limits, unchanged
from graftwork.transform.beside import FOLDER, Beside
from graftwork.transform.calibration import Windows, read_windows
from graftwork.transform.deepspeed import DeepSpeedSource, check_partitioned
from graftwork.transform.engine import Engine, Outcome, Texts
from graftwork.transform.format import checkpoint_config
from graftwork.transform.metrics import measurement, metric_words
from graftwork.transform.options import RANDOM, TransformOptions
from graftwork.transform.source import CheckpointSource, Source
from graftwork.transform.structure import skeleton
from graftwork.transform.writer import Writer

WORK = "work"
USUAL_WINDOWS = 140
"""WikiText-2's test text has about so many windows of 2,048 tokens."""
MODEL = "model"
DETAILS = "transform.json"


@dataclass
class Prepared:
    """All that is known before the first weight is read."""

    run: Run
    options: TransformOptions
    transforms: list[tuple[str, WeightTransform]]
    source: Source
    windows: Windows
    need: limits.Need


def transforms_of(run: Run) -> list[tuple[str, WeightTransform]]:
    """Return the weight transforms of the plugins of ``run``, in order, each with its plugin's name.

    Raises:
        UserError: there are none.
    """
    found: list[tuple[str, WeightTransform]] = []
    for plugin, transforms in run.plugins.call("weight_transforms", run=run):
        found += [(plugin, transform) for transform in transforms]
    if not found:
        named = ", ".join(run.plugins) or "none"
        raise UserError(
            f"no plugin of this run transforms weights (hook weight_transforms; plugins: {named}); name one that does "
            f"with --plugin"
        )
    check_order(found)
    return found


def check_order(transforms: Sequence[tuple[str, WeightTransform]]) -> None:
    """Refuse transforms that cannot follow one another.

    Raises:
        UserError: names both plugins, the hook, and the way out.
    """
    for number, (plugin, one) in enumerate(transforms):
        for earlier, before in transforms[:number]:
            if one.stored and before.stored:
                what = "both change the weights as they are stored"
                cure = "use one of them, and the other on its result, in a run of its own"
            elif one.stored:
                what = (
                    f"'{plugin}' changes the weights as they are stored, and '{earlier}' changes them before"
                )
                cure = f"name '{plugin}' first"
            elif before.rounds and one.rounds:
                what = "both round the weights"
                cure = "leave one of them out, or let one leave rounding to the other, where it can"
            elif before.rounds:
                what = f"'{earlier}' rounds the weights that '{plugin}' is to change"
                cure = f"name '{earlier}' last"
            elif before.factors and one.factors:
                what, cure = "both factorise the weights", "leave one of them out"
            elif before.rotates and one.scales:
                what = f"'{earlier}' rotates what '{plugin}' is to scale"
                cure = f"name '{plugin}' first"
            elif before.rotates and one.rotates:
                what, cure = "both rotate what goes into the linears", "leave one of them out"
            else:
                continue
            raise UserError(
                f"plugins '{earlier}' and '{plugin}' cannot be combined in this order: {what} (hook "
                f"weight_transforms); {cure}"
            )


def metric_names(spec: JobSpec) -> list[str]:
    """Return what a job may measure."""
    run = Run(Path(), spec.job, Plugins.from_options(spec.job.plugins, where=f"{spec.where}: "))
    options = spec.job.transform or TransformOptions.model_validate({})
    return list(metric_words(transforms_of(run), len(options.evaluation)))


def check_transform(spec: JobSpec) -> None:
    """Refuse what can be refused before weights are read.

    Raises:
        UserError: anything wrong with the job, its texts, its checkpoint, or a bound on memory that cannot be kept to.
    """
    prepare(spec, Path(), Console(enabled=False))


def prepare(spec: JobSpec, directory: Path, console: Console) -> Prepared:
    """Read configs, headers and texts; choose how to run."""
    job = spec.job
    rank, world = started()
    plugins = Plugins.from_options(job.plugins, where=f"{spec.where}: ")
    run = Run(directory, job, plugins, rank, world, console)
    options = job.transform or TransformOptions.model_validate({})
    run.plugins.check(run)
    transforms = transforms_of(run)
    if any(t.needs != "none" for _, t in transforms) and options.calibration is None:
        plugin = next(name for name, t in transforms if t.needs != "none")
        raise UserError(
            f"plugin '{plugin}' looks at activations, and no calibration text is set; set "
            f"transform.calibration=FILE (or random, to try)"
        )
    _refuse_adapter(job.model.ref, transforms[0][0])
    source = open_source(job, options)
    if options.deepspeed is not None:
        check_partitioned(transforms)
    merging = merging_of(transforms, options)
    tiles = beside = 0
    if merging is not None:
        experts = open_experts(merging, source, options)
        tiles, beside = HELD, stored_beside(merging.method, experts)
    windows = _windows(job, options)
    if windows.calibration is not None and len(windows.calibration) < world:
        raise UserError(
            f"{len(windows.calibration)} calibration windows cannot be shared by {world} processes; set "
            f"transform.samples higher, or start fewer"
        )
    need = _fitted_need(
        options,
        transforms,
        limits.sizes(source.skeleton(), source.dtype),
        calibration=windows.calibration.numel() if windows.calibration is not None else 0,
        evaluation=sum(one.numel() for one in windows.evaluation),
        processes=world,
        held=source.held,
        tiles=tiles,
        beside=beside,
    )
    return Prepared(run, options, transforms, source, windows, need)


def _refuse_adapter(ref: str, plugin: str) -> None:
    """Transforms change plain weights; say whose adapter stands in the way, where that is known."""
    found = resolve(ref)
    if not found.adapter:
        return
    maker = adapter_maker(Path(found.path))
    what, made = f"plugin '{plugin}' cannot be used", ""
    if maker is not None:
        what, made = (
            f"plugins '{maker}' and '{plugin}' cannot be combined",
            f" of '{maker}' (hook adapter_config)",
        )
    raise UserError(
        f"{what} on model '{ref}', which is an adapter{made}: it changes plain weights (hook weight_transforms); merge "
        f"the adapter into its base model first (PEFT: merge_and_unload), then transform the result"
    )


def adapter_maker(folder: Path) -> str | None:
    """Return the plugin that brought the adapter in the run directory around ``folder``; None where not known."""
    manifest = read_json(folder.parent / "manifest.json") or {}
    for name in manifest.get("plugins") or {}:
        with contextlib.suppress(UserError):
            if hasattr(load_class(name), "adapter_config"):
                return str(name)
    return None


def _fitted_need(
    options: TransformOptions,
    transforms: Sequence[tuple[str, WeightTransform]],
    size: limits.Sizes,
    *,
    calibration: int,
    evaluation: int,
    processes: int = 1,
    held: int = 0,
    tiles: int = 0,
    beside: int = 0,
) -> limits.Need:
    """Return what a job needs with so many tokens, within its bound on memory."""

    def need(batch_size: int, in_memory: bool) -> limits.Need:
        return limits.need(
            size,
            options,
            calibration=calibration,
            evaluation=evaluation,
            dense=any(t.dense for _, t in transforms),
            statistics=sum(t.needs != "none" for _, t in transforms),
            whole=any(t.prepare is not None for _, t in transforms),
            batch_size=batch_size,
            in_memory=in_memory,
            processes=processes,
            held=held,
            tiles=tiles,
            beside=beside,
        )

    wanted = need(options.batch_size, options.activations != "disk")
    return limits.fitted(wanted, options, need)


def _windows(job: Job, options: TransformOptions) -> Windows:
    """Return the windows of a job; the arms of a recipe mostly share them, and then they are tokenised once."""
    files = [Path(text) for text in (options.calibration, *options.evaluation) if text and text != RANDOM]
    stamps = tuple(path.stat().st_mtime_ns if path.is_file() else 0 for path in files)
    return _read(job.model.model_dump_json(), options.model_dump_json(), job.seed, stamps)


@lru_cache(maxsize=4)
def _read(model: str, options: str, seed: int, stamps: tuple[int, ...]) -> Windows:
    asked = ModelOptions.model_validate_json(model)
    config = load_config(asked.ref, trust_remote_code=asked.trust_remote_code)
    tokenizer = load_tokenizer(asked.ref, trust_remote_code=asked.trust_remote_code)
    return read_windows(TransformOptions.model_validate_json(options), tokenizer, config, seed)


def open_source(job: Job, options: TransformOptions) -> Source:
    """Return where the weights come from: the files, or a model that DeepSpeed has partitioned."""
    ref, dtype, trust = job.model.ref, job.model.dtype, job.model.trust_remote_code
    if options.deepspeed is None:
        return CheckpointSource(ref, dtype=dtype, trust_remote_code=trust)
    return DeepSpeedSource(ref, options.deepspeed, dtype=dtype, trust_remote_code=trust)


def run_transform(
    spec: JobSpec,
    directory: Path,
    *,
    console: Console,
    resume: bool = False,
    allow_other_versions: bool = False,
) -> dict[str, Any]:
    """Run one transform job in ``directory`` and return its result, which is also written there.

    Raises:
        UserError: anything wrong with the input.
    """
    job = spec.job
    finished = read_json(directory / "result.json")
    if finished is not None and resume:
        rank, world = started()
        run = Run(
            directory, job, Plugins.from_options(job.plugins, where=f"{spec.where}: "), rank, world, console
        )
        run.open(resume=True, allow_other_versions=allow_other_versions)
        if rank == 0:
            # Where it was cut off between the result and this.
            discard(directory / WORK)
        return dict(finished)
    shared = job.transform is not None and job.transform.deepspeed is not None
    if started()[1] > 1 and not shared:
        raise UserError(
            f"step '{spec.arm}' streams a checkpoint in one process; start it without torchrun, or set "
            f"transform.deepspeed"
        )
    memory.return_large_pieces()
    memory.reset_peak()
    begun = time.perf_counter()
    ready = prepare(spec, directory, console)
    main = ready.run.main
    work = directory / WORK
    if main and not work.exists():
        limits.check_disk(ready.need, directory)
    console.say(f"{spec.arm}: {limits.words(ready.need)}")
    with ready.run.locked(), together() if shared else contextlib.nullcontext():
        ready.run.open(resume=resume, allow_other_versions=allow_other_versions)
        # The main process refuses for all of them.
        barrier()
        known = from_main(unchanged.find(ready) if main else None)
        outcome = engine_of(ready, work, dense=known is None).run()
        if known is not None:
            outcome.dense_nll = known
        elif main:
            unchanged.keep(ready, outcome.dense_nll)
        size = from_main(_finish(ready, work, directory / MODEL, outcome) if main else 0)
        found = measurement(ready, outcome)
        result = {
            "name": spec.arm,
            "variant": spec.variant,
            "seed": job.seed,
            "plugins": job.plugins,
            "order": [],
            "scores": [],
            "general": {},
            "charts": [],
            **found,
            "metrics": {
                **found["metrics"],
                "size_mb": round(size / 1e6, 3),
            },
            "eval_seconds": round(time.perf_counter() - begun, 3),
            "peak_memory_bytes": memory.peak_bytes(),
            "output": MODEL,
        }
        if main:
            write_json_atomic(directory / DETAILS, {"layers": [asdict(one) for one in outcome.layers]})
            write_json_atomic(ready.run.result_path, result)
            discard(work)
        barrier()
    return result


def engine_of(ready: Prepared, work: Path | None, *, dense: bool = True) -> Engine:
    """Return the engine for a job."""
    windows, asked = ready.windows, ready.run.job.model
    evaluation = torch.cat(windows.evaluation) if windows.evaluation else None
    return Engine(
        ready.source,
        ready.transforms,
        Texts(windows.calibration, evaluation),
        batch_size=ready.need.batch_size,
        in_memory=ready.need.in_memory,
        work=work,
        format=ready.options.format,
        seed=ready.run.seed,
        tokenizer=lambda: load_tokenizer(asked.ref, trust_remote_code=asked.trust_remote_code),
        dense=dense,
        score_calibration=ready.options.score_calibration,
        console=ready.run.console,
    )


def describe(spec: JobSpec, variants: Sequence[str]) -> None:
    """Print what a job would do and need. Of the model and the texts only headers and windows are read.

    Where the recipe writes out the model's config, not even these: texts are counted as long as is asked for.
    """
    import click

    if spec.job.model.config is None:
        ready = prepare(spec, Path(), Console(enabled=False))
        transforms, need, notes = ready.transforms, ready.need, ready.windows.notes
    else:
        transforms, need, notes = _unread(spec)
    names = ", ".join(plugin if t.name == plugin else f"{plugin} ({t.name})" for plugin, t in transforms)
    click.echo(f"\n{spec.arm}\n  {spec.job.model.ref} through {names}")
    if len(variants) > 1:
        click.echo(f"  {len(variants)} variants: {', '.join(variants)}")
    options = spec.job.transform or TransformOptions.model_validate({})
    for expert, ref in sorted(options.experts.items()):
        click.echo(f"  expert {expert}: {ref}")
    click.echo(f"  {limits.words(need)}")
    for part, count in need.parts.items():
        click.echo(f"    {count / limits.GIB:8.2f} GiB  {part}")
    for note in notes:
        click.echo(f"  note: {note}")


def _unread(spec: JobSpec) -> tuple[list[tuple[str, WeightTransform]], limits.Need, list[str]]:
    """Return transforms, need and notes of a job whose model is known by its config alone."""
    job = spec.job
    run = Run(Path(), job, Plugins.from_options(job.plugins, where=f"{spec.where}: "))
    options = job.transform or TransformOptions.model_validate({})
    run.plugins.check(run)
    transforms = transforms_of(run)
    merging = merging_of(transforms, options)
    config = load_config(job.model.ref, inline=job.model.config)
    dtype = getattr(torch, "bfloat16" if job.model.dtype == "auto" else job.model.dtype)
    windows = len(options.evaluation) * (options.evaluation_windows or USUAL_WINDOWS)
    need = _fitted_need(
        options,
        transforms,
        limits.sizes(skeleton(config, dtype), dtype),
        calibration=options.samples * options.window if options.calibration else 0,
        evaluation=windows * options.evaluation_window,
        tiles=HELD if merging is not None else 0,
    )
    return transforms, need, ["from the config that the recipe writes out; no text was read"]


def _finish(ready: Prepared, work: Path, target: Path, outcome: Outcome) -> int:
    """Make the files the model; return the bytes of its weights."""
    source: Any = ready.source
    fields = json.loads(outcome.config.to_json_string())
    fields["dtype"] = str(ready.source.dtype).removeprefix("torch.")
    config = checkpoint_config({**fields, "quantization_config": outcome.quantization})
    layers = len(outcome.layers)
    # Before the model: where it is there, all is.
    Beside(work, layers).finish(
        target.parent / FOLDER,
        lambda: {one.name: one.about() for _, one in ready.transforms if one.about is not None},
    )
    return Writer(work, layers).finish(target, config, getattr(source, "folder", None))
