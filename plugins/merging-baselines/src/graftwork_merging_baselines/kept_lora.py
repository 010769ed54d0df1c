"""Keep every LoRA adapter beside the base and choose: lossless, and often the smallest."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from graftwork import UserError
from graftwork.merge.experts import Experts
from graftwork.merge.method import MergeMethod, Piece
from graftwork.merge.plugin import ExpandOptions, MergePlugin


class KeptLoraMethod(MergeMethod):
    """Each expert is its adapter."""

    merges = False
    routes = True

    def check(self, experts: Experts) -> None:
        """Refuse experts that are no adapters."""
        for index, name in enumerate(experts.names):
            if experts.adapter(index) is None:
                raise UserError(f"kept-lora: expert '{name}' is a whole model; this keeps LoRA adapters")

    def expert(self, piece: Piece, index: int) -> torch.Tensor:
        """Return the adapter's own difference."""
        return piece.deltas[index]

    def bits_per_weight(self, experts: Experts) -> float:
        """Return the base and all adapters."""
        adapters = [experts.adapter(index) for index in range(len(experts.names))]
        bits = sum(adapter.bits for adapter in adapters if adapter is not None)
        return 8.0 * experts.item + bits / experts.count


class KeptLora(MergePlugin):
    """Keep the adapters."""

    name = "kept-lora"
    Options = ExpandOptions
    tiny: ClassVar[dict[str, Any]] = {"expand": "a"}

    @classmethod
    def method(cls, options: ExpandOptions, seed: int) -> KeptLoraMethod:
        return KeptLoraMethod()
