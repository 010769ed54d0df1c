"""DARE: drop most of every difference at random and rescale the rest. Yu et al., ICML 2024."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from graftwork.console import Console
from graftwork.merge.experts import Experts
from graftwork.merge.method import MergeMethod, Piece
from graftwork.merge.plugin import MergePlugin
from graftwork.merge.signs import total
from graftwork_kernels import announce
from graftwork_kernels.ties_merge import ties_merge
from pydantic import BaseModel, ConfigDict, Field

from graftwork_merging_baselines.draws import dropped


class DareOptions(BaseModel):
    """Options of DARE."""

    model_config = ConfigDict(extra="forbid")

    drop: float = Field(0.9, ge=0, lt=1, description="probability that an entry of a difference is dropped")
    merge: Literal["sum", "ties"] = Field(
        "sum", description="what is left: summed up, or the mean of what has the elected sign"
    )
    alpha: float = Field(0.4, ge=0, description="scale of the merged difference")


class DareMethod(MergeMethod):
    """Every entry is dropped by itself, and what is left is divided by exactly 1 - p."""

    def __init__(self, options: DareOptions, seed: int) -> None:
        self.options, self.seed = options, seed

    def begin(self, experts: Experts, console: Console) -> None:
        """Say which kernels run."""
        if self.options.merge == "ties":
            announce(console.say, "cpu")

    def merge(self, piece: Piece) -> torch.Tensor:
        """Return the merged difference."""
        left = torch.stack([self._left(piece, index) for index in range(len(piece.experts))])
        merged = total(left) if self.options.merge == "sum" else ties_merge(left).float().double()
        return (self.options.alpha * merged).float()

    def _left(self, piece: Piece, index: int) -> torch.Tensor:
        """Return ``b * tau / (1 - p)`` of one expert, in float64."""
        delta = piece.deltas[index]
        key = (self.seed, piece.experts[index], piece.name)
        gone = dropped(key, piece.offset, delta.numel(), self.options.drop).view_as(delta)
        return torch.where(gone, 0.0, delta.double() / (1 - self.options.drop))


class Dare(MergePlugin):
    """Drop and rescale."""

    name = "dare"
    Options = DareOptions
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0}

    @classmethod
    def method(cls, options: DareOptions, seed: int) -> DareMethod:
        return DareMethod(options, seed)
