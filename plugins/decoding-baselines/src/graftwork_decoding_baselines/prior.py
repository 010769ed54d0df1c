"""Prior: what the model says without the context, ``z1``, where a prompt has one: what memory alone does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from graftwork import Combiner, hookimpl
from graftwork.generate.contrast import check_left

if TYPE_CHECKING:
    from graftwork.run import Run
    from transformers import PreTrainedModel


def prior_scores(main: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
    """Return z1, B x V; what is -inf in z2 stays so."""
    return check_left(contrast.masked_fill(main == -torch.inf, -torch.inf))


class Prior:
    """The contrast prompt decoded by itself."""

    def __init__(self, options: object) -> None:
        del options  # it has none

    @hookimpl
    def combiner(self, run: Run, model: PreTrainedModel) -> Combiner:
        return Combiner("prior", prior_scores)
