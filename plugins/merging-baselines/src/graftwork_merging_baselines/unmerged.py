"""What merges lie between: the base for everything, and every expert for its own."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from graftwork.merge.experts import Experts
from graftwork.merge.method import MergeMethod, Piece
from graftwork.merge.plugin import ExpandOptions, MergePlugin
from pydantic import Field


class UnmergedOptions(ExpandOptions):
    """Options of the references."""

    weights: Literal["base", "expert"] = Field("expert", description="whose weights serve an expert's tasks")


class UnmergedMethod(MergeMethod):
    """The base as it is, or all experts as they are."""

    routes = True

    def __init__(self, weights: Literal["base", "expert"]) -> None:
        self.weights = weights
        self.merges = weights == "base"

    def merge(self, piece: Piece) -> torch.Tensor:
        """Return that nothing is added."""
        return torch.zeros_like(piece.base)

    def expert(self, piece: Piece, index: int) -> torch.Tensor:
        """Return nothing, or the expert's own difference."""
        return self.merge(piece) if self.weights == "base" else piece.deltas[index]

    def bits_per_weight(self, experts: Experts) -> float:
        """Return one model, or all experts."""
        return 8.0 * experts.item * (1 if self.weights == "base" else len(experts.names))


class Unmerged(MergePlugin):
    """The base, or every expert."""

    name = "unmerged"
    Options = UnmergedOptions
    tiny: ClassVar[dict[str, Any]] = {"expand": "a"}

    @classmethod
    def method(cls, options: UnmergedOptions, seed: int) -> UnmergedMethod:
        return UnmergedMethod(options.weights)
