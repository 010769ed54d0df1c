"""The mean of all experts: theta_0 + sum_i w_i tau_i with weights that sum to 1."""

from __future__ import annotations

from typing import Any

import torch
from graftwork import UserError
from graftwork.merge.method import MergeMethod, Piece
from graftwork.merge.plugin import MergePlugin
from graftwork.merge.signs import total
from pydantic import BaseModel, ConfigDict, Field


class AverageOptions(BaseModel):
    """Options of the average."""

    model_config = ConfigDict(extra="forbid")

    weights: dict[str, float] = Field(
        {}, description="expert: its weight, 1 where not set; divided by their sum"
    )


class AverageMethod(MergeMethod):
    """Mean of the experts (model soups, Wortsman et al., ICML 2022)."""

    def __init__(self, options: AverageOptions) -> None:
        self.weights = options.weights

    def begin(self, experts: Any, console: Any) -> None:
        """Refuse weights that fit no experts."""
        for name, weight in self.weights.items():
            if name not in experts.names:
                raise UserError(
                    f"average: weights names '{name}', which is no expert: {', '.join(experts.names)}"
                )
            if weight < 0:
                raise UserError(f"average: the weight of '{name}' is {weight}; weights are at least 0")
        if not sum(self.weights.get(name, 1.0) for name in experts.names):
            raise UserError("average: all weights are 0; at least one is above")

    def merge(self, piece: Piece) -> torch.Tensor:
        """Return the weighted mean of the differences."""
        if not self.weights:
            return (total(piece.deltas) / len(piece.experts)).float()
        weights = [self.weights.get(name, 1.0) for name in piece.experts]
        found = torch.zeros_like(piece.base, dtype=torch.float64)
        for weight, delta in zip(weights, piece.deltas, strict=True):
            found += delta.double() * weight
        return (found / sum(weights)).float()


class Average(MergePlugin):
    """The mean of all experts."""

    name = "average"
    Options = AverageOptions

    @classmethod
    def method(cls, options: AverageOptions, seed: int) -> AverageMethod:
        return AverageMethod(options)
