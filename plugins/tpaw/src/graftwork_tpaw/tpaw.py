"""TPAW: a team of the last checkpoints writes the negatives, gives the references, and is weighed twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from graftwork import PairBatch, PairLoss, SelfPlay, hookimpl
from graftwork.models import load_config
from graftwork.self_play.options import SelfPlayOptions
from pydantic import Field, model_validator

from graftwork_tpaw import metrics
from graftwork_tpaw.checks import check_team
from graftwork_tpaw.head import token_log_probs
from graftwork_tpaw.loss import TeamTerms, player_weights, team_terms

if TYPE_CHECKING:
    from graftwork.recipe import Job
    from graftwork.run import Run

# Nats per token by which the same weights differ when they compute the same answer in another batch.
ROUNDING, HALF_ROUNDING = 1e-4, 2e-3
# A player with this share of a row's weight has it to itself; warned of where this share of rows is so.
ALONE, MOST = 0.99, 0.9


class TpawOptions(SelfPlayOptions):
    """Options of TPAW."""

    players: int = Field(
        3, ge=1, description="checkpoints in the team, which are the references (N_max); 1: the newest only"
    )
    rounds: int = Field(3, ge=1, description="checkpoints whose answers are trained on (N_max)")
    scale: float = Field(
        0.1, gt=0, allow_inf_nan=False, description="lambda: reward per nat of the log-ratio"
    )
    eta: float = Field(
        6.0,
        ge=1,
        allow_inf_nan=False,
        description="weight of a target that is no likelier than under a player; 1: off",
    )
    gamma: float = Field(
        0.5,
        ge=0,
        allow_inf_nan=False,
        description="sharpness of the players' weights; 0: all count the same",
    )
    tolerance: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="nats per token by which a target may be likelier and still counts as no likelier, against "
        "rounding; where not set, 1e-4 in float32 and 2e-3 in half precision; 0: the formula literally",
    )
    margin_uses_alpha: bool = Field(
        False,
        description="put eta into the margin that weighs the players; no gradient passes through weights",
    )

    @model_validator(mode="after")
    def _used(self) -> TpawOptions:
        if self.margin_uses_alpha and (self.gamma == 0 or self.players == 1 or self.eta == 1):
            raise ValueError(
                "margin_uses_alpha does nothing with one player, gamma = 0 or eta = 1; leave it out"
            )
        check_team(self.team, self.players, self.rounds)
        return self


class Tpaw:
    """Learn to tell targets from what the last checkpoints write, each of them judging in its own measure."""

    Options = TpawOptions
    tiny: ClassVar[dict[str, Any]] = {
        "iterations": 2,
        "players": 2,
        "rounds": 2,
        "writing": {"max_new_tokens": 6},
    }
    sharding = frozenset({"zero2", "zero3", "fsdp2"})

    def __init__(self, options: TpawOptions) -> None:
        self.options = options
        self.tolerance = ROUNDING if options.tolerance is None else options.tolerance

    @hookimpl
    def self_play(self, run: Run) -> SelfPlay:
        if self.options.tolerance is None and in_half_precision(run.job):
            self.tolerance = HALF_ROUNDING
        return SelfPlay(
            self.options,
            self.loss,
            players=self.options.players,
            rounds=self.options.rounds,
            inspect=self.inspect,
            token_log_probs=token_log_probs(run),
        )

    def loss(self, batch: PairBatch) -> PairLoss:
        """Return the team's loss of every pair."""
        terms = self.terms(batch)
        return PairLoss(terms.rows, metrics.team(terms) | metrics.log_probabilities(batch))

    def terms(self, batch: PairBatch) -> TeamTerms:
        """Return the loss of every pair and its parts."""
        options = self.options
        return team_terms(
            batch.chosen,
            batch.rejected,
            batch.reference_chosen,
            batch.reference_rejected,
            scale=options.scale,
            eta=options.eta,
            gamma=options.gamma,
            tolerance=self.tolerance * batch.chosen_tokens,
            margin_uses_alpha=options.margin_uses_alpha,
        )

    def inspect(self, chosen: torch.Tensor, rejected: torch.Tensor) -> list[str]:
        """Say where one player has (nearly) all weight in most rows: the team is then this player."""
        players = chosen.shape[1]
        if players == 1 or self.options.margin_uses_alpha:
            return []
        weights = player_weights(chosen, rejected, scale=self.options.scale, gamma=self.options.gamma)
        shares = (weights >= ALONE).double().mean(0)
        share, player = float(shares.max()), int(shares.argmax())
        if share < MOST:
            return []
        return [
            f"in {share:.0%} of the pairs player {player} of 0 (the newest) to {players - 1} has {ALONE:.0%} or more "
            f"of the weight, so that the team is this one player; a smaller plugins.tpaw.gamma "
            f"({self.options.gamma:g}) or plugins.tpaw.scale ({self.options.scale:g}) weighs more evenly"
        ]


def in_half_precision(job: Job) -> bool:
    """Return whether ``job`` computes in bfloat16 or float16, by its weights or by autocast."""
    if job.train.get("bf16") or job.train.get("fp16"):
        return True
    model = job.model
    if model.dtype != "auto":
        return model.dtype != "float32"
    config = load_config(model.ref, inline=model.config, trust_remote_code=model.trust_remote_code)
    return getattr(config, "dtype", None) in (torch.bfloat16, torch.float16)
