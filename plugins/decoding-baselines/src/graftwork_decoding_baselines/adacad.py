"""AdaCAD: Wang et al., "AdaCAD: Adaptively Decoding to Balance Conflicts between Contextual and Parametric Knowledge"
(arXiv 2409.07394).

CAD whose weight at a step is the Jensen-Shannon divergence (nats) of the two distributions:
``(1 + a) z2 - a z1``, ``a = JSD(p1, p2)``. Its released code averages the divergence over the batch; here every row
has its own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from graftwork import Combiner, hookimpl
from graftwork.generate.contrast import log_probabilities, tilt
from pydantic import BaseModel, ConfigDict, Field

from graftwork_decoding_baselines.divergence import jensen_shannon

if TYPE_CHECKING:
    from graftwork.run import Run
    from transformers import PreTrainedModel


class AdaCadOptions(BaseModel):
    """Options of AdaCAD."""

    model_config = ConfigDict(extra="forbid")

    floor: float = Field(
        0.0,
        ge=0,
        le=math.log(2),
        description="least weight; the released code's is 0.3 for long texts and 0 for short answers",
    )


def adacad_scores(main: torch.Tensor, contrast: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
    """Return ``z2 + max(JSD, floor) (l2 - l1)``, B x V, with a weight per row."""
    weight = jensen_shannon(*log_probabilities(main, contrast)).clamp(min=floor)
    return tilt(main, contrast, weight)


class AdaCad:
    """The contrast, as strong as the two distributions differ."""

    Options = AdaCadOptions
    tiny: ClassVar[dict[str, Any]] = {"floor": 0.69}

    def __init__(self, options: AdaCadOptions) -> None:
        self.options = options

    @hookimpl
    def combiner(self, run: Run, model: PreTrainedModel) -> Combiner:
        return Combiner("adacad", lambda main, contrast: adacad_scores(main, contrast, self.options.floor))
