"""What the trainer's ``deepspeed`` field asks for, read before anything is loaded."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from graftwork.errors import UserError

if TYPE_CHECKING:
    from graftwork.plugins import Plugins


def read_config(train: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the DeepSpeed configuration that ``train.deepspeed`` names or holds, None where there is none.

    Raises:
        UserError: the file is missing or no JSON object.
    """
    value = train.get("deepspeed")
    return None if value is None else parsed(value, "train.deepspeed")


def parsed(value: str | Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the DeepSpeed configuration that the setting ``key`` names (a file) or holds.

    Raises:
        UserError: the file is missing or no JSON object.
    """
    if isinstance(value, Mapping):
        return dict(value)
    try:
        config = json.loads(Path(value).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{key} names '{value}', which cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{key}: '{value}' is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{key}: '{value}' holds no JSON object")
    return config


def zero_stage(train: Mapping[str, Any]) -> int:
    """Return the ZeRO stage (0 where nothing is sharded)."""
    section = (read_config(train) or {}).get("zero_optimization") or {}
    return int(section.get("stage", 0))


# What reads or edits weights between forward and backward passes sees empty ones where they are sharded.
_READING = ("task_begin", "task_end", "loss_terms", "transform_gradients", "batch_begin")


def check(train: Mapping[str, Any], plugins: Plugins) -> None:
    """Refuse what cannot be trained with sharded parameters.

    Raises:
        UserError: ZeRO-3 beside a plugin that works on weights while they are sharded.
    """
    if zero_stage(train) < 3:
        return
    for hook in _READING:
        for plugin in plugins.implements(hook):
            raise UserError(
                f"train.deepspeed asks for ZeRO stage 3, which shards the weights, and plugin '{plugin}' works on "
                f"them during training (hook {hook}): use stage 1 or 2 (with offload_optimizer where memory is "
                f"short)"
            )


def let_go() -> None:
    """Load and use models as without DeepSpeed, until the next trainer's arguments are made.

    transformers shards every model that it loads while a configuration of ZeRO-3 is alive, and lets all
    processes generate in step. Between tasks each process has the whole model and works for itself.
    """
    unset_hf_deepspeed_config()


def gather(sharded: torch.nn.Module, whole: torch.nn.Module) -> None:
    """Copy the parameters and buffers of ``sharded`` (ZeRO-3) into ``whole``, one at a time, in all processes."""
    # By name, since it need not be installed.
    zero: Any = importlib.import_module("deepspeed").zero
    into = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in sharded.named_parameters():
            with zero.GatheredParameters([parameter]):
                into[name].copy_(parameter)
            into[name].requires_grad_(parameter.requires_grad)
        buffers = dict(whole.named_buffers())
        for name, buffer in sharded.named_buffers():
            buffers[name].copy_(buffer)
