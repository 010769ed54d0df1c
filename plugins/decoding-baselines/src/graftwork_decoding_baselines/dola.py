"""DoLa: Chuang et al., "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models", ICLR 2024
(arXiv 2309.03883).

Every candidate layer j predicts with the model's own head: ``p_j``. The premature layer M of a position is the
candidate whose prediction is farthest from the last layer's, ``argmax_j JSD(p_N, p_j)``; the score is
``log p_N - log p_M`` on ``p_N >= plausibility max p_N`` and -inf elsewhere.

Ours: an early layer's state goes through the model's final norm before its head (the released code leaves it out),
and every row chooses its own layer (transformers' implementation averages over the batch). The paper's repetition
penalty of 1.2 is ``generate``'s own option ``repetition_penalty``; it acts on these scores, as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from graftwork import UserError, hookimpl
from graftwork.generate.contrast import log_ratio
from pydantic import BaseModel, ConfigDict, Field

from graftwork_decoding_baselines.contrastive import plausible
from graftwork_decoding_baselines.divergence import jensen_shannon
from graftwork_decoding_baselines.early_logits import EarlyLogits

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from graftwork.run import Run
    from transformers import PreTrainedModel


class DolaOptions(BaseModel):
    """Options of DoLa."""

    model_config = ConfigDict(extra="forbid")

    layers: Literal["low", "high"] | list[int] = Field(
        "high",
        description="candidates: every other layer of the lower or the upper half, or their numbers (0: embeddings, "
        "k: after k layers)",
    )
    plausibility: float = Field(
        0.1, ge=0, le=1, description="least probability of a token, as a share of the likeliest one's"
    )


def candidates(layers: Literal["low", "high"] | list[int], depth: int, tied: bool) -> list[int]:
    """Return the candidate layers of a model of ``depth`` layers; ``tied``: its head is its embeddings.

    With tied embeddings layer 0 predicts the token it has read, so the lower half starts at 2.

    Raises:
        UserError: a number that is no layer before the last, one given twice, or none left.
    """
    if isinstance(layers, list):
        for place, layer in enumerate(layers):
            if not 0 <= layer < depth or layer in layers[:place]:
                raise UserError(
                    f"plugins.dola.layers = {layers}: name different layers from 0 to {depth - 1}, those before the "
                    f"last of {depth}"
                )
        found = layers
    elif layers == "low":
        found = list(range(2 if tied else 0, min(depth // 2, 20), 2))
    else:
        found = list(range(max(depth // 2, depth - 20), depth, 2))
    if not found:
        raise UserError(
            f"plugins.dola.layers = {layers} leaves no candidate in a model of {depth} layers; name them"
        )
    return found


def dola_scores(
    last: torch.Tensor, early: torch.Tensor, plausibility: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores, N x V, and the index (N) of the chosen candidate of every position.

    ``last``: logits of the last layer, N x V; ``early``: those of the candidates, C x N x V.
    """
    distances = jensen_shannon(last.log_softmax(-1), early.log_softmax(-1)).squeeze(-1)
    chosen = distances.argmax(0)
    premature = early[chosen, torch.arange(len(last), device=early.device)]
    scores = log_ratio(last, premature).masked_fill(~plausible(last, plausibility), -torch.inf)
    return scores, chosen


class Dola:
    """What a model's last layer adds to an earlier one."""

    Options = DolaOptions
    tiny: ClassVar[dict[str, Any]] = {"layers": [0]}

    def __init__(self, options: DolaOptions) -> None:
        self.options = options

    @hookimpl
    def check(self, run: Run) -> None:
        others = [name for name in run.plugins.implements("combiner") if name != "dola"]
        if others:
            raise UserError(
                f"plugins 'dola' and '{others[0]}' cannot be combined: 'dola' contrasts layers and '{others[0]}' "
                f"prompts (hook combiner), and what both together would mean is not defined; leave one of them out"
            )
        if run.job.evaluate.scoring == "likelihood":
            raise UserError(
                "plugin 'dola' rules most tokens out, so labels have no likelihood; set evaluate.scoring: generate"
            )

    @hookimpl
    def generation_context(self, run: Run, model: PreTrainedModel) -> AbstractContextManager[None]:
        # In the forward pass and not as a logits processor: a penalty of generate acts after it.
        early = EarlyLogits(model)
        found = candidates(self.options.layers, early.depth, early.tied)
        share = self.options.plausibility
        return early.replacing(found, lambda last, before: dola_scores(last, before, share)[0])
