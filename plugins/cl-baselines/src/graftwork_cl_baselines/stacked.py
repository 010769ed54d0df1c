"""What the methods share that train a fresh LoRA per task on top of the older, frozen ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from graftwork import Adapter
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StackedOptions(BaseModel):
    """The LoRA that every task gets."""

    model_config = ConfigDict(extra="forbid")

    rank: int = Field(8, ge=1, description="rank of every task's adapter")
    alpha: float = Field(32, gt=0, description="LoRA alpha; the scale is alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout (0.1 in some official scripts)")
    target_modules: str | list[str] = Field("all-linear", description="as in PEFT")

    def adapter(self) -> Adapter:
        """Return this LoRA with the policy ``stacked``."""
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
        )
        return Adapter(config, "stacked")


class Factors(NamedTuple):
    """The LoRA matrices of one layer: A of the frozen adapters (each r x d_in), A and B (d_out x r) of the new one."""

    old: list[torch.Tensor]
    a: torch.Tensor
    b: torch.Tensor


def training_layers(model: torch.nn.Module) -> Iterator[tuple[str, LoraLayer, str]]:
    """Yield (name, layer, adapter that trains) of every LoRA layer; a frozen A does not hide it, B always trains."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            new = [key for key in layer.active_adapters if key in layer.lora_B]
            new = [key for key in new if layer.lora_B[key].weight.requires_grad]
            if new:
                yield name, layer, new[-1]


def factors(model: torch.nn.Module) -> list[Factors]:
    """Return the :class:`Factors` of every LoRA layer, in the model's order."""
    return [
        Factors(
            [
                layer.lora_A[key].weight.detach()
                for key in layer.active_adapters
                if key in layer.lora_A and key != new
            ],
            layer.lora_A[new].weight,
            layer.lora_B[new].weight,
        )
        for _, layer, new in training_layers(model)
    ]


def adapted_layers(adapter: Adapter, model: PreTrainedModel) -> dict[str, LoraLayer]:
    """Return the layers of ``model`` (on the meta device) that ``adapter`` will adapt, by name, without a trace.

    A target that PEFT does not find is left to the injection itself, which says so: the result is empty then.
    """
    try:
        trial = inject_adapter_in_model(copy.deepcopy(adapter.config), copy.deepcopy(model))
    except ValueError:
        return {}
    return {name: layer for name, layer in trial.named_modules() if isinstance(layer, LoraLayer)}
