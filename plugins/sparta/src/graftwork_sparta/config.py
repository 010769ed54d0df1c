"""The PEFT configuration of SpaRTA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig, PeftType


@dataclass
class SpartaConfig(PeftConfig):
    """Two branches of different rank on every target, and a router that weighs them.

    ``tasks`` counts the tasks that the router (and, with ``specific="per_task"``, the specific branch)
    has grown for; a saved adapter is rebuilt from it. ``graftwork_plugin`` tells a reader of the saved
    config which plugin brings the method.
    """

    rank_shared: int = field(default=2, metadata={"help": "rank of the shared branch; 0 leaves it out"})
    rank_specific: int = field(default=8, metadata={"help": "rank of the specific branch; 0 leaves it out"})
    scale: float = field(default=1.0, metadata={"help": "constant factor c of both branches"})
    init: Literal["lora", "lineage"] = field(
        default="lora", metadata={"help": "Kaiming, or normal with std 1/r^2"}
    )
    dropout: float = field(default=0.0, metadata={"help": "dropout on the input of both branches"})
    target_modules: str | list[str] | None = field(default="all-linear", metadata={"help": "as in LoRA"})
    exclude_modules: str | list[str] | None = field(default=None, metadata={"help": "as in LoRA"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "as in LoRA"})
    layers_pattern: str | list[str] | None = field(default=None, metadata={"help": "as in LoRA"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "as in LoRA"})
    bias: str = field(default="none", metadata={"help": "only 'none'"})
    router: Literal["prompt", "lineage", "off"] = field(
        default="prompt", metadata={"help": "form of the router"}
    )
    lineage_pool: Literal["all", "prompt"] = field(
        default="all", metadata={"help": "positions that the lineage router sums over"}
    )
    block_layers: int = field(default=4, metadata={"help": "decoder layers that share a gate"})
    components: int = field(default=8, metadata={"help": "router components that every task adds"})
    orth_mode: Literal["penalty", "project"] = field(
        default="penalty",
        metadata={"help": "project: take the shared input directions out of the specific branch"},
    )
    specific: Literal["single", "per_task"] = field(
        default="single", metadata={"help": "per_task: a fresh specific branch per task, older ones frozen"}
    )
    prompt_fallback: Literal["half", "refuse"] = field(
        default="half", metadata={"help": "rows without a prompt: take their first half, or refuse"}
    )
    tasks: int = field(default=1, metadata={"help": "number of tasks that the adapter has grown for"})
    graftwork_plugin: str = field(default="sparta", metadata={"help": "the plugin that brings this method"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("SPARTA")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if min(self.rank_shared, self.rank_specific) < 0 or self.rank_shared + self.rank_specific == 0:
            raise ValueError("SpaRTA needs a positive rank in at least one branch")
        for name in ("block_layers", "components", "tasks"):
            if getattr(self, name) < 1:
                raise ValueError(f"SpaRTA: {name} must be at least 1, not {getattr(self, name)}")
        if self.bias != "none":
            raise ValueError("SpaRTA trains no biases; leave bias at 'none'")
