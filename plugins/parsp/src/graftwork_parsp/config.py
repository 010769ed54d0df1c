"""The PEFT configuration of PaRSP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig, PeftType


@dataclass
class ParspConfig(PeftConfig):
    """Row-sparse changes of the MLPs' input projections, inside a region and a null space.

    The shapes of a saved adapter come with its tensors: what was learned for earlier tasks, and the region of the
    task at hand. ``graftwork_plugin`` tells a reader of the saved config which plugin brings the method.
    """

    density: float = field(default=0.05, metadata={"help": "share of a layer's neurons in a core"})
    form: Literal["full", "lora"] = field(
        default="full", metadata={"help": "Theta itself, or Theta = B A of rank 'rank'"}
    )
    rank: int = field(default=8, metadata={"help": "rank of Theta, for form 'lora'"})
    down: Literal["none", "columns"] = field(
        default="none", metadata={"help": "columns: the core's columns of the output projection train too"}
    )
    neurons: dict[str, Any] | None = field(
        default=None, metadata={"help": "names of an unknown model's projections: {in: [...], out: name}"}
    )
    target_modules: str | list[str] | None = field(
        default=None, metadata={"help": "found from the model where not given"}
    )
    column_modules: list[str] | None = field(
        default=None, metadata={"help": "those of target_modules that change by columns"}
    )
    exclude_modules: str | list[str] | None = field(default=None, metadata={"help": "as in LoRA"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "as in LoRA"})
    sizes: dict[str, list[int]] = field(
        default_factory=dict,
        metadata={"help": "per layer: neurons changed so far, in the core, columns of the basis"},
    )
    graftwork_plugin: str = field(default="parsp", metadata={"help": "the plugin that brings this method"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("PARSP")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if not 0 < self.density <= 1:
            raise ValueError(f"PaRSP: density is a share above 0 and at most 1, not {self.density}")
        if self.rank < 1:
            raise ValueError(f"PaRSP: rank must be at least 1, not {self.rank}")
