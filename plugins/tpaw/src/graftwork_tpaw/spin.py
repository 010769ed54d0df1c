"""SPIN (Chen et al., ICML 2024): learn to tell targets from what the last checkpoint writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from graftwork import PairBatch, PairLoss, SelfPlay, hookimpl
from graftwork.self_play.options import SelfPlayOptions
from pydantic import Field, model_validator

from graftwork_tpaw import metrics
from graftwork_tpaw.checks import check_team
from graftwork_tpaw.head import token_log_probs
from graftwork_tpaw.loss import spin_loss

if TYPE_CHECKING:
    from graftwork.run import Run

Beta = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SpinOptions(SelfPlayOptions):
    """Options of SPIN."""

    beta: Beta | list[Beta] = Field(
        0.1, description="lambda: reward per nat of the log-ratio; a list has one for every iteration"
    )
    loss: Literal["logistic", "hinge"] = Field("logistic", description="of the margin")
    rounds: Literal[1, 2] = Field(
        1, description="checkpoints whose answers are trained on; 2: the last two, as the official scripts do"
    )

    @model_validator(mode="after")
    def _used(self) -> SpinOptions:
        if isinstance(self.beta, list) and len(self.beta) != self.iterations:
            raise ValueError(
                f"beta has {len(self.beta)} values for {self.iterations} iterations; give one for each, or one number"
            )
        check_team(self.team, 1, self.rounds)
        return self

    def beta_of(self, iteration: int) -> float:
        """Return beta of an iteration (from 1)."""
        return self.beta[iteration - 1] if isinstance(self.beta, list) else self.beta


class Spin:
    """One player, the last checkpoint, is opponent and reference."""

    Options = SpinOptions
    tiny: ClassVar[dict[str, Any]] = {"iterations": 2, "writing": {"max_new_tokens": 6}}
    sharding = frozenset({"zero2", "zero3", "fsdp2"})

    def __init__(self, options: SpinOptions) -> None:
        self.options = options

    @hookimpl
    def self_play(self, run: Run) -> SelfPlay:
        return SelfPlay(
            self.options, self.loss, rounds=self.options.rounds, token_log_probs=token_log_probs(run)
        )

    def loss(self, batch: PairBatch) -> PairLoss:
        """Return SPIN's loss of every pair."""
        beta = self.options.beta_of(batch.iteration)
        rows = spin_loss(
            batch.chosen,
            batch.rejected,
            batch.reference_chosen[:, 0],
            batch.reference_rejected[:, 0],
            beta=beta,
            kind=self.options.loss,
        )
        return PairLoss(rows, metrics.pair_rewards(batch, beta, 0) | metrics.log_probabilities(batch))
