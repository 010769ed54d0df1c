"""Training that divides weights, gradients or optimizer state among processes: what is asked for, who may take part.

A plugin declares with a class attribute ``sharding`` what its training was seen to be equal under::

    class Plugin:
        sharding = frozenset({"zero2", "fsdp2"})

What it does not declare is refused before anything is loaded: a method that reads a weight of which it has a part
would compute something else, without a word.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from graftwork.errors import PluginError, UserError
from graftwork.train.deepspeed import zero_stage

if TYPE_CHECKING:
    from transformers import Trainer

    from graftwork.plugins import Plugins

KINDS = {
    "zero2": "ZeRO stage 1 or 2 of DeepSpeed (train.deepspeed)",
    "zero3": "ZeRO stage 3 of DeepSpeed (train.deepspeed)",
    "fsdp2": "FSDP2 (train.fsdp)",
}
"""What a plugin may declare, in words. Without ZeRO's stages DeepSpeed counts as ``zero2``: it keeps gradients."""
TRAINING = (
    "adapter_config",
    "training_algorithm",
    "self_play",
    "loss_terms",
    "transform_gradients",
    "learning_rate_factors",
    "batch_begin",
    "task_stream",
    "training_data",
    "task_begin",
    "task_end",
)
"""Hooks through which a plugin takes part in training; who has none of them need not declare anything."""
_LAUNCHERS = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "train.deepspeed"),
    "ACCELERATE_USE_FSDP": ("FSDP", "train.fsdp"),
}


def kind_of(train: Mapping[str, Any]) -> str | None:
    """Return which of :data:`KINDS` the trainer's fields ask for, None where every process holds everything.

    Raises:
        UserError: a file that cannot be read, both at once, FSDP's first version.
    """
    if train.get("fsdp"):
        if train.get("deepspeed"):
            raise UserError("train.fsdp and train.deepspeed both divide the model; remove one of them")
        version = fsdp_config(train).get("version", 2)
        if int(version) != 2:
            raise UserError(
                f"train.fsdp_config.version = {version}: a stream of tasks is trained with FSDP2; set it to 2"
            )
        return "fsdp2"
    if not train.get("deepspeed"):
        return None
    return "zero3" if zero_stage(train) >= 3 else "zero2"


def fsdp_config(train: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ``train.fsdp_config`` holds or the JSON file that it names, without transformers' old prefix.

    Raises:
        UserError: the file is missing or no JSON object.
    """
    value = train.get("fsdp_config") or {}
    if not isinstance(value, Mapping):
        path = Path(str(value))
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"train.fsdp_config names '{path}', which cannot be read: {error.strerror}"
            ) from None
        except ValueError as error:
            raise UserError(f"train.fsdp_config: '{path}' is not valid JSON ({error})") from None
        if not isinstance(value, dict):
            raise UserError(f"train.fsdp_config: '{path}' holds no JSON object")
    return {key.removeprefix("fsdp_"): one for key, one in value.items()}


def declared(plugins: Plugins, name: str) -> frozenset[str]:
    """Return what the plugin ``name`` declares, empty where it declares nothing.

    Raises:
        PluginError: it declares something that there is not.
    """
    found = getattr(plugins.objects[name], "sharding", ())
    try:
        chosen = frozenset(found)
    except TypeError:
        chosen = frozenset([repr(found)])
    if isinstance(found, str) or not chosen <= KINDS.keys():
        known = ", ".join(sorted(KINDS))
        error = ValueError(f"sharding = {found!r}: it is a set of names among {known}")
        raise PluginError(name, "sharding", error)
    return chosen


def check(train: Mapping[str, Any], plugins: Plugins, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse a sharded run with a plugin that does not declare it, and one that only the launcher knows of.

    Raises:
        UserError: which plugin or setting, which sharding, and the way out.
    """
    for variable, (what, field) in _LAUNCHERS.items():
        if environ.get(variable, "").lower() in ("true", "1"):
            raise UserError(
                f"the launcher's own configuration turns on {what}, which the run's manifest would not know of; "
                f"write it into {field} instead, and leave it out of accelerate's configuration"
            )
    kind = kind_of(train)
    if kind is None:
        return
    hooks = [plugin for hook in TRAINING for plugin in plugins.implements(hook)]
    for name in dict.fromkeys(hooks):
        known = declared(plugins, name)
        if kind not in known:
            ways = [f"with {words}" for other, words in KINDS.items() if other in known]
            raise UserError(
                f"plugin '{name}' does not declare that it can be trained under {KINDS[kind]}; train data-parallel, "
                f"without it, {''.join(f'or {way}, ' for way in ways)}or leave the plugin out"
            )


def recomputes(train: Mapping[str, Any]) -> bool:
    """Return whether FSDP2 itself is asked to compute activations again instead of keeping them."""
    if kind_of(train) != "fsdp2":
        return False
    return str(fsdp_config(train).get("activation_checkpointing", False)).lower() == "true"


def check_recomputation(train: Mapping[str, Any], checkpointing: bool) -> None:
    """Refuse that both FSDP2 and the trainer (``checkpointing``, by default with TRL) do so.

    Raises:
        UserError: they do.
    """
    if checkpointing and recomputes(train):
        raise UserError(
            "train.fsdp_config.activation_checkpointing and train.gradient_checkpointing both compute activations "
            "again; set train.gradient_checkpointing: false, which TRL's trainers turn on"
        )


def check_processes(train: Mapping[str, Any], count: int) -> None:
    """Refuse FSDP2 in one process, which has nobody to share with; DeepSpeed can still offload.

    Raises:
        UserError: it is one.
    """
    if count == 1 and kind_of(train) == "fsdp2":
        raise UserError(
            "train.fsdp divides the model among processes, and this is one; start several with "
            "`torchrun --nproc_per_node N -m graftwork ...`, or remove train.fsdp"
        )


def check_active(kind: str | None, trainer: Trainer) -> None:
    """Make sure that FSDP2 is on where it was asked for: accelerate trains data-parallel on CPUs without a word.

    Raises:
        UserError: it is not.
    """
    if kind == "fsdp2" and not trainer.accelerator.is_fsdp2:
        raise UserError(
            "train.fsdp asks for FSDP2, and accelerate shards on accelerators only, of which this machine has none; "
            "remove train.fsdp to train data-parallel, or use train.deepspeed, which shards on CPUs too"
        )


def let_go() -> None:
    """Load and use models as without sharding, until the next trainer's arguments are made.

    transformers shards every model that it loads while a configuration of ZeRO-3 is alive, and lets all processes
    generate in step. accelerate leaves a mark in the environment that would shard the next job, too. Between tasks
    each process has the whole model and works for itself.
    """
    unset_hf_deepspeed_config()
    for variable in _LAUNCHERS:
        os.environ.pop(variable, None)


def gather(sharded: torch.nn.Module, whole: torch.nn.Module) -> None:
    """Copy parameters and buffers of ``sharded`` (ZeRO-3, FSDP2) into ``whole``, one at a time, in all processes.

    Which parameters train is taken over, too.
    """
    parameters, buffers = dict(whole.named_parameters()), dict(whole.named_buffers())
    with torch.no_grad():
        for name, value in _gathered(sharded):
            into = parameters[name]
            into.copy_(value)
            into.requires_grad_(value.requires_grad)
        for name, buffer in sharded.named_buffers():
            buffers[name].copy_(_full(buffer))


def _gathered(sharded: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in sharded.named_parameters():
        if hasattr(parameter, "ds_id"):
            # By name, since it need not be installed.
            zero: Any = importlib.import_module("deepspeed").zero
            with zero.GatheredParameters([parameter]):
                yield name, parameter
        else:
            yield name.replace("_checkpoint_wrapped_module.", ""), _full(parameter)


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a DTensor with its ``requires_grad``, any other tensor as it is."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    whole: torch.Tensor = tensor.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
    return whole.detach().requires_grad_(tensor.requires_grad)
