"""Interpolation: the geometric mean of the two distributions, ``a l2 + (1 - a) l1``.

The weight 0.75 is that of the repository keith-Jiang/conflict-aware-decoding, where it stands beside contrastive
methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from graftwork import Combiner, hookimpl
from graftwork.generate.contrast import tilt
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from graftwork.run import Run
    from transformers import PreTrainedModel


class InterpolationOptions(BaseModel):
    """Options of interpolation."""

    model_config = ConfigDict(extra="forbid")

    weight: float = Field(
        0.75, ge=0, le=1, description="of the distribution with the context; the other gets the rest"
    )


def interpolation_scores(main: torch.Tensor, contrast: torch.Tensor, weight: float) -> torch.Tensor:
    """Return ``z2 - (1 - weight) (l2 - l1)``, B x V: the mean up to a constant of the row; z2 at weight = 1."""
    return tilt(main, contrast, weight - 1.0)


class Interpolation:
    """Between the context and memory, for every token alike."""

    Options = InterpolationOptions
    tiny: ClassVar[dict[str, Any]] = {"weight": 0.2}
    neutral: ClassVar[dict[str, Any]] = {"weight": 1.0}

    def __init__(self, options: InterpolationOptions) -> None:
        self.options = options

    @hookimpl
    def combiner(self, run: Run, model: PreTrainedModel) -> Combiner:
        weight = self.options.weight
        return Combiner("interpolation", lambda main, contrast: interpolation_scores(main, contrast, weight))
