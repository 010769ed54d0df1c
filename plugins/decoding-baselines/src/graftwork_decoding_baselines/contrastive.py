"""Contrastive decoding: Li et al., "Contrastive Decoding: Open-ended Text Generation as Optimization", ACL 2023
(arXiv 2210.15097).

Among the tokens that the expert finds plausible, ``p_expert >= plausibility max p_expert``, the score is
``log p_expert - log p_amateur``, the amateur being a smaller model of the same vocabulary whose logits are divided
by a temperature. Every other token is ruled out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from graftwork import Combiner, UserError, hookimpl
from graftwork.generate.contrast import log_ratio
from graftwork.models import is_encoder_decoder, load_config, load_model, load_tokenizer
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from graftwork.run import Run
    from transformers import PreTrainedModel


class ContrastiveOptions(BaseModel):
    """Options of contrastive decoding."""

    model_config = ConfigDict(extra="forbid")

    amateur: str = Field(description="hub id or folder of a smaller model with the same vocabulary")
    plausibility: float = Field(
        0.1, ge=0, le=1, description="least probability of a token, as a share of the likeliest one's"
    )
    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="of the amateur: its logits are divided by this"
    )


def plausible(logits: torch.Tensor, share: float) -> torch.Tensor:
    """Return the tokens (bool ... x V) that are at least ``share`` times as likely as the likeliest of their row."""
    least = logits.amax(-1, keepdim=True) + (math.log(share) if share else -math.inf)
    return (logits >= least) & (logits > -torch.inf)


def contrastive_scores(
    expert: torch.Tensor, amateur: torch.Tensor, share: float = 0.1, temperature: float = 1.0
) -> torch.Tensor:
    """Return ``log p_expert - log p_amateur`` on the expert's plausible tokens and -inf elsewhere, B x V.

    The rows are shifted to the scale of the expert's logits, which changes no probability.
    """
    gain = log_ratio(expert, amateur / temperature) + expert.logsumexp(-1, keepdim=True)
    return gain.masked_fill(~plausible(expert, share), -torch.inf)


class ContrastiveDecoding:
    """What the model knows better than an amateur."""

    Options = ContrastiveOptions

    def __init__(self, options: ContrastiveOptions) -> None:
        self.options = options
        self.amateur: Any = None

    @hookimpl
    def check(self, run: Run) -> None:
        model, ref = run.job.model, self.options.amateur
        theirs = load_config(ref)
        if is_encoder_decoder(theirs):
            raise UserError(
                f"plugins.contrastive-decoding.amateur = '{ref}' is a {theirs.model_type} model; a decoder-only one "
                f"is needed"
            )
        ours = load_config(model.ref, inline=model.config, trust_remote_code=model.trust_remote_code)
        sizes = [config.get_text_config().vocab_size for config in (ours, theirs)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"plugins.contrastive-decoding.amateur = '{ref}' has {sizes[1]} tokens and '{model.ref}' has "
                f"{sizes[0]}; both need the same vocabulary"
            )
        if model.config is None and load_tokenizer(ref).get_vocab() != load_tokenizer(model.ref).get_vocab():
            raise UserError(
                f"plugins.contrastive-decoding.amateur = '{ref}' and '{model.ref}' have as many tokens, but not the "
                f"same; both need the same vocabulary"
            )

    @hookimpl
    def combiner(self, run: Run, model: PreTrainedModel) -> Combiner:
        if self.amateur is None:
            self.amateur = load_model(self.options.amateur, dtype=run.job.model.dtype).eval().to(model.device)
        share, temperature = self.options.plausibility, self.options.temperature
        return Combiner(
            "contrastive-decoding",
            lambda expert, amateur: contrastive_scores(expert, amateur, share, temperature),
            amateur=self.amateur,
            explain=lambda expert, amateur: {"plausible": plausible(expert, share)},
        )
