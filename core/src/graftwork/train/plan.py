"""``--dry-run``: what a job would train, how much memory it would take and how many steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from graftwork.data.stream import build_stream
from graftwork.errors import UserError
from graftwork.evaluate.benchmarks import find_benchmark
from graftwork.evaluate.job import check_evaluation
from graftwork.models import build_meta, is_encoder_decoder
from graftwork.plugins import Plugins
from graftwork.recipe import Job, JobSpec
from graftwork.run import Run
from graftwork.train.adapters import AdapterStack, count_parameters
from graftwork.train.algorithms import check_per_task
from graftwork.train.footprint import BYTES, FULL, HALF, Sharding, activations, default, state
from graftwork.train.job import Plan
from graftwork.train.sharding import recomputes

# What a prompt is taken to be long where neither the recipe nor the trainer limits it.
UNLIMITED_PROMPT = 512


def dry_run(spec: JobSpec, variants: Sequence[str] = (), gpus: int = 1) -> None:
    """Resolve ``spec``, build its model on the meta device, inject its adapter, and print what came out.

    ``variants`` are the seeds, orders and so on that the job will be run with, ``gpus`` how many it will have.

    Raises:
        UserError: whatever refuses a job before its weights are read.
    """
    job = spec.job
    if job.benchmark:
        _describe_evaluation(spec, variants)
        return
    if job.model.ref.startswith("step:"):
        _describe_later(spec, variants)
        return
    run = Run(Path(), job, Plugins.from_options(job.plugins, where=f"{spec.where}: "))
    plan = Plan.make(run)
    if job.data.order and plan.self_play is None:
        check_per_task(job.per_task, job.data.order)
    model: Any = plan.meta
    if plan.adapter:
        with torch.device("meta"):
            stack = AdapterStack(plan.adapter, model, job.model.ref)
            stack.begin(job.data.order[0] if job.data.order else "task", job.seed)
        model = stack.model
    trainable, total = count_parameters(model)
    click.echo(f"\n{spec.arm}")
    rows = [
        ("model", f"{job.model.ref}, {total - (trainable if plan.adapter else 0):,} parameters"),
        ("plugins", ", ".join(job.plugins) or "none"),
        ("trainer", plan.algorithm.trainer.__name__),
        ("adapter", _adapter(plan)),
        ("trainable", f"{trainable:,} parameters ({100 * trainable / total:.2f} %)"),
        *_memory(plan, job, trainable, total, gpus),
        ("batch", _batch(job.train, gpus)),
        *(_self_play(plan, gpus) if plan.self_play else [("steps", _steps(job, run, gpus))]),
    ]
    rows += _options(run, variants)
    rows.append(("train fields", ", ".join(f"{k}={v}" for k, v in job.train.items()) or "all defaults"))
    for task, fields in job.per_task.items():
        rows.append((f"for {task}", ", ".join(f"{k}={v}" for k, v in fields.items())))
    _show(rows)


def _describe_later(spec: JobSpec, variants: Sequence[str]) -> None:
    """Print what is known of a training job whose model an earlier step makes."""
    run = Run(Path(), spec.job, Plugins.from_options(spec.job.plugins, where=f"{spec.where}: "))
    click.echo(f"\n{spec.arm}")
    _show(
        [
            ("model", f"{spec.job.model.ref} (made by an earlier step, so memory is not known yet)"),
            ("plugins", ", ".join(spec.job.plugins) or "none"),
            *_options(run, variants),
            ("train fields", ", ".join(f"{k}={v}" for k, v in spec.job.train.items()) or "all defaults"),
        ]
    )


def _self_play(plan: Plan, gpus: int) -> list[tuple[str, str]]:
    """Return the rows about iterations, players and steps."""
    assert plan.self_play is not None
    play, job = plan.self_play[1], plan.run.job
    answers = (
        f"{play.samples} answer{'s' if play.samples > 1 else ''} a prompt" if play.samples else "no answers"
    )
    limit = int(job.train.get("max_steps", -1))
    pairs = (job.data.train_items or 0) * max(play.rounds, 1)
    steps = (
        f"{limit} per iteration"
        if limit > 0
        else f"at most {_of_task(job, '', pairs, gpus)} per iteration (from train_items and rounds)"
        if pairs
        else "an iteration's pairs decide"
    )
    return [
        (
            "self-play",
            f"{play.options.iterations} iterations of up to {play.players} players and {play.rounds} rounds, {answers}",
        ),
        ("steps", steps),
    ]


def _describe_evaluation(spec: JobSpec, variants: Sequence[str]) -> None:
    """Print what an evaluation job would measure, and on what; refuse what can be refused."""
    job = spec.job
    run = Run(Path(), job, Plugins.from_options(job.plugins, where=f"{spec.where}: "))
    section = job.benchmark or {}
    _, benchmark = find_benchmark(run, section["name"])
    if spec.needs:
        model = (
            f"{job.model.ref} (made by an earlier step)"
            if job.model.ref.startswith("step:")
            else job.model.ref
        )
    else:
        check_evaluation(spec)
        meta = build_meta(
            job.model.ref, inline=job.model.config, trust_remote_code=job.model.trust_remote_code
        )
        model = f"{job.model.ref}, {sum(one.numel() for one in meta.parameters()):,} parameters"
    options = ", ".join(f"{key}={value}" for key, value in section.items() if key != "name")
    click.echo(f"\n{spec.arm}")
    _show(
        [
            ("model", model),
            ("plugins", ", ".join(job.plugins) or "none"),
            ("benchmark", f"{section['name']}: {benchmark.summary}"),
            ("its options", options or "all defaults"),
            ("metrics", ", ".join(benchmark.metrics)),
            *_options(run, variants),
        ]
    )


def _options(run: Run, variants: Sequence[str]) -> list[tuple[str, str]]:
    rows = []
    for plugin, options in run.job.plugins.items():
        values = getattr(run.plugins.objects[plugin], "options", None)
        shown = values.model_dump() if values is not None else options
        rows.append((f"options of {plugin}", ", ".join(f"{k}={v}" for k, v in shown.items()) or "none"))
    if len(variants) > 1:
        rows.append(("runs", f"{len(variants)}: {'; '.join(variants)}"))
    return rows


def _show(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"  {name.ljust(width)}  {value}")


def _adapter(plan: Plan) -> str:
    if plan.adapter is None:
        return "none (all weights train)"
    kind = plan.adapter.config.peft_type
    return f"{getattr(kind, 'value', kind)}, {plan.adapter.policy} over tasks"


def _memory(plan: Plan, job: Job, trainable: int, total: int, gpus: int) -> list[tuple[str, str]]:
    """Return the rows about memory per GPU; see :mod:`graftwork.train.footprint`."""
    config: Any = plan.meta.config
    train, trainer = job.train, plan.algorithm.config
    bf16, fp16 = default(trainer, train, "bf16"), default(trainer, train, "fp16")
    # TRL leaves bf16 open and turns it on where fp16 is off.
    half = bool(fp16) or (not fp16 if bf16 is None else bool(bf16))
    sharding = Sharding.of(train, gpus, half=half)
    stored = str(getattr(config, "dtype", None)) if job.model.dtype == "auto" else job.model.dtype
    size = BYTES.get(stored.removeprefix("torch."), FULL)
    frozen, note = total - trainable, ""
    if plan.adapter and plan.adapter.policy != "shared" and len(job.data.order or []) > 1:
        # The adapters of earlier tasks stay, in the precision they were trained in.
        count = len(job.data.order or [])
        frozen += (count - 1) * trainable * FULL // size
        note = f", with the adapters of {count} tasks"
    parts = state(
        frozen,
        trainable,
        frozen_bytes=size,
        # PEFT keeps what it adds in fp32.
        trained_bytes=FULL if plan.adapter else size,
        sharding=sharding,
    )
    batch = int(default(trainer, train, "per_device_train_batch_size") or 8)
    prompt, answer = _lengths(job, config)
    most = activations(
        config,
        rows=batch,
        prompt=prompt,
        answer=answer,
        checkpointing=recomputes(train) or bool(default(trainer, train, "gradient_checkpointing")),
        compute_bytes=HALF if half or size == HALF else FULL,
    )
    whole = parts.weights + parts.gradients + parts.optimizer + most
    return [
        ("weights", _gib(parts.weights) + note),
        ("gradients", _gib(parts.gradients)),
        ("optimizer", f"{_gib(parts.optimizer)} (Adam)"),
        ("activations", f"at most {_gib(most)} for {batch} items of {prompt + answer:,} tokens"),
        (
            "memory",
            f"about {_gib(whole)} per GPU (an estimate: {sharding.words()}; the parts above and nothing else)",
        ),
    ]


def _lengths(job: Job, config: Any) -> tuple[int, int]:
    """Return the longest prompt and answer in tokens, as far as the recipe limits them."""
    answer = job.evaluate.max_new_tokens
    prompt = job.data.max_prompt_tokens
    if is_encoder_decoder(config):
        return prompt or UNLIMITED_PROMPT, answer
    most = int(job.train.get("max_length") or 1024)
    return min(most, prompt + answer if prompt else most) - answer, answer


def _batch(train: Mapping[str, Any], gpus: int) -> str:
    each, accumulated = _sizes(train)
    where = f"{gpus} GPU{'s' if gpus > 1 else ''}"
    return f"{each * accumulated * gpus} items a step: {each} x {accumulated} accumulated x {where}"


def _sizes(train: Mapping[str, Any]) -> tuple[int, int]:
    return int(train.get("per_device_train_batch_size", 8)), int(train.get("gradient_accumulation_steps", 1))


def _steps(job: Job, run: Run, gpus: int) -> str:
    data, order = job.data, job.data.order or []
    if int(job.train.get("max_steps", -1)) > 0 and not job.per_task:
        count = len(order) or 1
        return f"{job.train['max_steps']} per task, {count} task{'s' if count > 1 else ''}"
    if data.train_items and order:
        steps = [_of_task(job, name, data.train_items, gpus) for name in order]
        return f"at most {_sum(steps)} (from train_items; data not read)"
    try:
        tasks = build_stream(data, seed=job.seed, sources=run.plugins.data_sources(run))
    except UserError:
        return "unknown: the data is not on this disk and neither max_steps nor train_items is given"
    return _sum([_of_task(job, task.name, len(task.train), gpus) for task in tasks])


def _of_task(job: Job, name: str, items: int, gpus: int) -> int:
    train = {**job.train, **job.per_task.get(name, {})}
    if int(train.get("max_steps", -1)) > 0:
        return int(train["max_steps"])
    each, accumulated = _sizes(train)
    return math.ceil(math.ceil(items / (each * accumulated * gpus)) * float(train.get("num_train_epochs", 3)))


def _sum(steps: Sequence[int]) -> str:
    plural = "s" if len(steps) > 1 else ""
    return f"{sum(steps)} in {len(steps)} task{plural} ({', '.join(map(str, steps))})"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
