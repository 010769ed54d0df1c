"""Task arithmetic: theta_0 + alpha sum_i tau_i. Ilharco et al., ICLR 2023."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from graftwork.merge.method import MergeMethod, Piece
from graftwork.merge.plugin import MergePlugin
from graftwork.merge.signs import total
from pydantic import BaseModel, ConfigDict, Field


class TaskArithmeticOptions(BaseModel):
    """Options of task arithmetic."""

    model_config = ConfigDict(extra="forbid")

    alpha: float = Field(
        0.4, ge=0, description="scale of the sum of all differences; tune it on validation items"
    )


class TaskArithmeticMethod(MergeMethod):
    """The sum of all differences, scaled."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def merge(self, piece: Piece) -> torch.Tensor:
        """Return ``alpha * sum_i tau_i``."""
        return (self.alpha * total(piece.deltas)).float()


class TaskArithmetic(MergePlugin):
    """The sum of all differences, scaled."""

    name = "task-arithmetic"
    Options = TaskArithmeticOptions
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0}

    @classmethod
    def method(cls, options: TaskArithmeticOptions, seed: int) -> TaskArithmeticMethod:
        return TaskArithmeticMethod(options.alpha)
