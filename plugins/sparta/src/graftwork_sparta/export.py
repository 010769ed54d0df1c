"""Take a SpaRTA adapter elsewhere: one branch as plain LoRA, or everything folded in with fixed gates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from graftwork import UserError
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from graftwork_sparta.layer import SpartaLinear
from graftwork_sparta.model import active_adapter, gate_values, layers_of, routers_of


def export_branch(
    model: nn.Module, folder: Path | str, branch: Literal["shared", "specific"], adapter: str | None = None
) -> None:
    """Write one branch as an ordinary LoRA adapter that PEFT loads without this package.

    It computes W0 x + c B A x of that branch, without a gate. Frozen branches of earlier tasks
    (``specific="per_task"``) belong to ``specific``.

    Raises:
        UserError: the branch has rank 0.
    """
    name = adapter or active_adapter(model)
    config = layers_of(model, name)[0].configs[name]
    folder = Path(folder)
    tensors: dict[str, torch.Tensor] = {}
    targets: set[str] = set()
    rank = 0
    for key, layer in _named_layers(model, name):
        a, b, (shared, _) = layer.factors(name)
        a, b = (a[:shared], b[:, :shared]) if branch == "shared" else (a[shared:], b[:, shared:])
        rank = len(a)
        tensors[f"base_model.model.{key}.lora_A.weight"] = a.detach().contiguous().cpu()
        tensors[f"base_model.model.{key}.lora_B.weight"] = b.detach().contiguous().cpu()
        targets.add(key)
    if rank == 0:
        raise UserError(f"the adapter has no {branch} branch (its rank is 0)")
    lora = LoraConfig(
        r=rank,
        lora_alpha=config.scale * rank,
        target_modules=sorted(targets),
        fan_in_fan_out=any(
            not isinstance(layer.get_base_layer(), nn.Linear) for layer in layers_of(model, name)
        ),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    lora.save_pretrained(str(folder))


@torch.no_grad()
def merge_static(model: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> tuple[nn.Module, torch.Tensor]:
    """Fold the adapter in with its gates fixed at their mean over ``batches`` of prompts.

    ``batches`` are the keyword arguments of a forward pass (input_ids, attention_mask). Returns the merged
    model and the gates' standard deviation (blocks x 2): where it is not small, the merged model answers
    differently from the adapter.

    Raises:
        UserError: there was no batch.
    """
    name = active_adapter(model)
    seen = []
    for batch in batches:
        model(**batch)
        seen.append(gate_values(model, name))
    if not seen:
        raise UserError("merge_static needs at least one batch of prompts to take the gates' mean over")
    gates = torch.cat(seen)
    for router, mean in zip(routers_of(model, name), gates.mean(0), strict=True):
        router.static[name] = mean
    return model.merge_and_unload(), gates.std(0, correction=0)


def _named_layers(model: nn.Module, name: str) -> list[tuple[str, SpartaLinear]]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return [
        (key, module)
        for key, module in base.named_modules()
        if isinstance(module, SpartaLinear) and name in module.configs
    ]
