"""TIES-Merging: trim, elect signs, merge what agrees. Yadav et al., NeurIPS 2023."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from graftwork.console import Console
from graftwork.merge.experts import Experts
from graftwork.merge.method import MergeMethod, Piece
from graftwork.merge.plugin import MergePlugin
from graftwork.merge.trim import Trim
from graftwork_kernels import announce
from graftwork_kernels.ties_merge import ties_merge
from pydantic import BaseModel, ConfigDict, Field


class TiesOptions(BaseModel):
    """Options of TIES."""

    model_config = ConfigDict(extra="forbid")

    keep: float = Field(
        0.2, gt=0, le=1, description="share of every expert's entries that is kept, the largest"
    )
    trim_scope: Literal["model", "tensor"] = Field(
        "model", description="the largest over the whole model, or in every tensor by itself"
    )
    aggregate: Literal["mean", "sum", "max"] = Field(
        "mean", description="what becomes of the entries that have the elected sign"
    )
    alpha: float = Field(1.0, ge=0, description="scale of the merged difference")


class TiesMethod(MergeMethod):
    """Trim, elect, merge; where kept entries sum to exactly 0 there is no sign and nothing is added."""

    def __init__(self, options: TiesOptions) -> None:
        self.options = options
        self.trim = Trim(options.keep, options.trim_scope)

    def begin(self, experts: Experts, console: Console) -> None:
        """Find the thresholds."""
        announce(console.say, "cpu")
        self.trim.begin(experts, console)

    def merge(self, piece: Piece) -> torch.Tensor:
        """Return the merged difference."""
        found = ties_merge(piece.deltas, *self.trim.limits(piece), self.options.aggregate)
        return found if self.options.alpha == 1 else found * self.options.alpha


class Ties(MergePlugin):
    """Trim, elect signs, merge what agrees."""

    name = "ties"
    Options = TiesOptions
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0}

    @classmethod
    def method(cls, options: TiesOptions, seed: int) -> TiesMethod:
        return TiesMethod(options)
