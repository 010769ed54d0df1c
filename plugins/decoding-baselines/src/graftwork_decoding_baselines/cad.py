"""CAD: Shi et al., "Trusting Your Evidence: Hallucinate Less with Context-aware Decoding", 2023 (arXiv 2305.14739).

``(1 + alpha) z2 - alpha z1``, z2 and z1 the logits with and without the context. Up to a constant of the row
this is classifier-free guidance with the scale ``1 + alpha``.
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


class CadOptions(BaseModel):
    """Options of CAD."""

    model_config = ConfigDict(extra="forbid")

    alpha: float = Field(
        0.5,
        ge=0,
        allow_inf_nan=False,
        description="weight of the contrast; the paper's is 0.5 for summaries and 1 for conflicting facts",
    )


def cad_scores(main: torch.Tensor, contrast: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return ``z2 + alpha (l2 - l1)``, B x V: CAD up to a constant of the row; z2 itself at alpha = 0."""
    return tilt(main, contrast, alpha)


class Cad:
    """The contrast of every token with the same weight."""

    Options = CadOptions
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0}

    def __init__(self, options: CadOptions) -> None:
        self.options = options

    @hookimpl
    def combiner(self, run: Run, model: PreTrainedModel) -> Combiner:
        return Combiner("cad", lambda main, contrast: cad_scores(main, contrast, self.options.alpha))
