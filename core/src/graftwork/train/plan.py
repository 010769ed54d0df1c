"""``--dry-run``: what a job would train, how much memory it would take and how many steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from transformers import PreTrainedModel

from graftwork.data.stream import build_stream
from graftwork.errors import UserError
from graftwork.plugins import Plugins
from graftwork.recipe import JobSpec
from graftwork.run import Run
from graftwork.train.adapters import AdapterStack, count_parameters
from graftwork.train.job import Plan

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def dry_run(spec: JobSpec, variants: Sequence[str] = ()) -> None:
    """Resolve ``spec``, build its model on the meta device, inject its adapter, and print what came out.

    ``variants`` are the seeds, orders and so on that the job will be run with.
    """
    job = spec.job
    run = Run(Path(), job, Plugins.from_options(job.plugins, where=f"{spec.where}: "))
    plan = Plan.make(run)
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
        *_memory(plan.meta, job.model.dtype, trainable, bool(plan.adapter), job.train),
        ("steps", _steps(spec, run)),
    ]
    for plugin, options in job.plugins.items():
        resolved = run.plugins.objects[plugin]
        values = getattr(resolved, "options", None)
        shown = values.model_dump() if values is not None else options
        rows.append((f"options of {plugin}", ", ".join(f"{k}={v}" for k, v in shown.items()) or "none"))
    if len(variants) > 1:
        rows.append(("runs", f"{len(variants)}: {'; '.join(variants)}"))
    rows.append(("train fields", ", ".join(f"{k}={v}" for k, v in job.train.items()) or "all defaults"))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"  {name.ljust(width)}  {value}")


def _adapter(plan: Plan) -> str:
    if plan.adapter is None:
        return "none (all weights train)"
    kind = plan.adapter.config.peft_type
    return f"{getattr(kind, 'value', kind)}, {plan.adapter.policy} over tasks"


def _memory(
    meta: torch.nn.Module, dtype: str, trainable: int, adapted: bool, train: dict[str, Any]
) -> list[tuple[str, str]]:
    """Estimate memory per process without sharding: weights, trained state, activations.

    Trained state is a gradient and two Adam moments in fp32 per trainable parameter, plus an fp32 copy
    of adapter parameters. Activations are those of one micro-batch: per token and layer about
    17 hidden + 3 intermediate widths (what a pre-norm decoder block keeps for its backward pass), and
    the logits once in fp32 with their gradient; with gradient checkpointing one hidden state per layer.
    """
    config = getattr(meta, "config", None)
    stored = getattr(config, "dtype", None) if dtype == "auto" else None
    size = BYTES.get(str(stored).removeprefix("torch."), 4) if dtype == "auto" else BYTES[dtype]
    base = sum(p.numel() for p in meta.parameters() if not p.requires_grad) if adapted else 0
    weights = (base or sum(p.numel() for p in meta.parameters())) * size
    state = trainable * (12 + (4 if adapted else 0))
    rows = [("weights", _gib(weights)), ("trained state", f"{_gib(state)} (gradients, Adam, fp32)")]
    if not isinstance(meta, PreTrainedModel):
        return rows
    text = meta.config.get_text_config()
    tokens = int(train.get("per_device_train_batch_size", 8)) * int(train.get("max_length") or 1024)
    layers, hidden = int(text.num_hidden_layers), int(text.hidden_size)
    middle = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    per_layer = hidden if train.get("gradient_checkpointing", True) else 17 * hidden + 3 * middle
    activations = tokens * (layers * per_layer * size + 8 * int(text.vocab_size))
    rows.append(("activations", f"at most {_gib(activations)} for {tokens:,} tokens a step (estimate)"))
    rows.append(
        ("memory", f"about {_gib(weights + state + activations)} per process, nothing sharded (estimate)")
    )
    return rows


def _steps(spec: JobSpec, run: Run) -> str:
    train, data = spec.job.train, spec.job.data
    if int(train.get("max_steps", -1)) > 0:
        count = len(data.order or []) or 1
        return f"{train['max_steps']} per task, {count} task{'s' if count > 1 else ''}"
    batch = int(train.get("per_device_train_batch_size", 8)) * int(
        train.get("gradient_accumulation_steps", 1)
    )
    epochs = float(train.get("num_train_epochs", 3))
    if data.train_items and data.order:
        each = math.ceil(math.ceil(data.train_items / batch) * epochs)
        return f"at most {each} per task, {len(data.order)} tasks (from train_items; data not read)"
    try:
        tasks = build_stream(data, seed=spec.job.seed, sources=run.plugins.data_sources(run))
    except UserError:
        return "unknown: the data is not on this disk and neither max_steps nor train_items is given"
    steps = [math.ceil(math.ceil(len(task.train) / batch) * epochs) for task in tasks]
    return f"{sum(steps)} in {len(tasks)} task{'s' if len(tasks) > 1 else ''} ({', '.join(map(str, steps))})"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
