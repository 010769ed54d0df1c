"""Continued SFT: the targets alone, in the same iterations, steps and windows. The control of self-play."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from graftwork import PairBatch, PairLoss, SelfPlay, hookimpl
from graftwork.self_play.options import SelfPlayOptions
from pydantic import model_validator

from graftwork_tpaw import metrics
from graftwork_tpaw.head import token_log_probs
from graftwork_tpaw.loss import sft_loss

if TYPE_CHECKING:
    from graftwork.run import Run


class ContinuedSftOptions(SelfPlayOptions):
    """Options of continued SFT."""

    @model_validator(mode="after")
    def _used(self) -> ContinuedSftOptions:
        for name, field in SelfPlayOptions.model_fields.items():
            if name != "iterations" and getattr(self, name) != field.get_default(call_default_factory=True):
                raise ValueError(
                    f"{name} does nothing in continued SFT, which writes no answers; leave it out"
                )
        return self


class ContinuedSft:
    """No player writes anything; the model goes on learning the targets."""

    Options = ContinuedSftOptions
    tiny: ClassVar[dict[str, Any]] = {"iterations": 2}
    sharding = frozenset({"zero2", "zero3", "fsdp2"})

    def __init__(self, options: ContinuedSftOptions) -> None:
        self.options = options

    @hookimpl
    def self_play(self, run: Run) -> SelfPlay:
        return SelfPlay(self.options, self.loss, samples=0, token_log_probs=token_log_probs(run))

    def loss(self, batch: PairBatch) -> PairLoss:
        """Return the negative log-likelihood per token of every target."""
        return PairLoss(sft_loss(batch.chosen, batch.chosen_tokens), metrics.log_probabilities(batch))
