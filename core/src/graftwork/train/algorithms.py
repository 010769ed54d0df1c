"""Which trainer class a recipe means, and its arguments from the recipe's ``train:`` section."""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments

from graftwork.data.options import DataOptions
from graftwork.errors import UserError, did_you_mean
from graftwork.hookspecs import TrainingAlgorithm
from graftwork.models import is_encoder_decoder
from graftwork.train.seq2seq import PromptSeq2SeqTrainer

# Decided by the run itself: where it writes, what it repeats, whom it tells.
RESERVED = {
    "output_dir": "the run directory, --output",
    "seed": "the recipe's own 'seed'",
    "resume_from_checkpoint": "--resume",
    "load_best_model_at_end": "nothing: the last step counts, test data never selects a model",
}
# How long and how fast a task is learned; what the run is made of stays the same for all.
PER_TASK = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
)


def algorithm(name: str) -> TrainingAlgorithm:
    """Return the trainer and config class behind ``algorithm: sft|dpo|grpo|seq2seq|trainer``."""
    if name == "trainer":
        return TrainingAlgorithm(Trainer, TrainingArguments)
    if name == "seq2seq":
        return TrainingAlgorithm(PromptSeq2SeqTrainer, Seq2SeqTrainingArguments)
    import trl

    prefix = name.upper()
    return TrainingAlgorithm(getattr(trl, f"{prefix}Trainer"), getattr(trl, f"{prefix}Config"))


def check_pairing(name: str, config: Any, data: DataOptions) -> None:
    """Refuse an algorithm that is for other models or prompts than those of ``config`` and ``data``.

    Raises:
        UserError: an encoder-decoder with one of TRL's trainers, ``seq2seq`` with a decoder or with chats.
    """
    if is_encoder_decoder(config) and name not in ("seq2seq", "trainer"):
        raise UserError(
            f"algorithm '{name}' trains causal language models, and the model is an encoder-decoder "
            f"({config.model_type}); use algorithm: seq2seq"
        )
    if name == "seq2seq" and not is_encoder_decoder(config):
        raise UserError(
            f"algorithm 'seq2seq' trains encoder-decoders, and the model is a causal language model "
            f"({config.model_type}); use algorithm: sft"
        )
    if name == "seq2seq" and data.prompt == "chat":
        raise UserError("algorithm 'seq2seq' takes prompts and answers as text; set data.prompt to plain")


def check_per_task(per_task: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    """Refuse ``per_task`` where it names no task of the stream, or fields that are one for the whole run.

    Raises:
        UserError: which, and what it may name.
    """
    for task, fields in per_task.items():
        if task not in names:
            raise UserError(
                f"per_task names the task '{task}', which is not in the stream{did_you_mean(task, names)}; "
                f"it has: {', '.join(names)}"
            )
        for field in fields:
            if field not in PER_TASK:
                raise UserError(
                    f"per_task.{task}.{field}: a task may have its own {', '.join(PER_TASK)}; everything else is "
                    f"in 'train', for all tasks"
                )


def check_fields(config: type[TrainingArguments], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``fields`` with their types put right (``"1e-4"`` is a number where one is expected).

    Raises:
        UserError: a field that the config class does not have, one that the run decides, a wrong type.
    """
    # A plain yes is what transformers wants for ``fsdp``; its annotation names only the older words.
    hints = {**typing.get_type_hints(config), "fsdp": bool | str | None}
    known = {field.name for field in dataclasses.fields(config) if field.init}
    result = {}
    for key, value in fields.items():
        if key in RESERVED:
            raise UserError(f"train.{key} is decided by {RESERVED[key]}; remove it from 'train'")
        if key not in known:
            raise UserError(f"train.{key}: {config.__name__} has no field '{key}'{did_you_mean(key, known)}")
        try:
            result[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise UserError(f"train.{key} = {value!r}: {problem[0].lower() + problem[1:]}") from None
        except Exception:
            # A few fields have annotations that pydantic cannot build a schema for; the class checks those.
            result[key] = value
    return result


def build_arguments(
    config: type[TrainingArguments], fields: Mapping[str, Any], *, output_dir: str, seed: int
) -> TrainingArguments:
    """Construct the trainer's arguments and make sure that the processes asked for are really there.

    Defaults of ours, where the recipe is silent: no reporting to services, checkpoints limited to two,
    losses logged every 5 steps, NaN losses not hidden, and the CPU where there is no accelerator.
    """
    chosen = check_fields(config, fields)
    defaults: dict[str, Any] = {
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 5,
        "logging_nan_inf_filter": False,
        "save_total_limit": 2,
    }
    if not torch.accelerator.is_available():
        # TRL's configs turn bf16 on by default and refuse a CPU then.
        defaults |= {"use_cpu": True, "bf16": False}
    try:
        arguments = config(**{**defaults, **chosen}, output_dir=output_dir, seed=seed)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"train: {config.__name__} refuses these fields: {error}") from error
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if arguments.world_size != asked:
        raise UserError(
            f"the launcher started {asked} processes but the trainer sees {arguments.world_size}; "
            f"on CPUs start them with `torchrun --nproc_per_node {asked} -m graftwork ...`"
        )
    return arguments
