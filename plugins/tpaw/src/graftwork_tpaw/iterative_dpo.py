"""Iterative DPO: several answers a prompt, scored; DPO between the best and the worst, then new answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graftwork import PairBatch, PairLoss, Sample, SelfPlay, hookimpl
from graftwork.self_play.options import SelfPlayOptions
from pydantic import Field, model_validator

from graftwork_tpaw import metrics
from graftwork_tpaw.head import token_log_probs
from graftwork_tpaw.loss import dpo_loss
from graftwork_tpaw.rewards import check_reward, reward

if TYPE_CHECKING:
    from graftwork.run import Run


class IterativeDpoOptions(SelfPlayOptions):
    """Options of iterative DPO."""

    samples: int = Field(4, ge=2, description="answers per prompt and iteration")
    beta: float = Field(0.1, gt=0, allow_inf_nan=False, description="reward per nat of the log-ratio")
    reward: str = Field(
        "exact",
        min_length=1,
        description="of an answer: exact (its words are the target's), f1 (of words shared with the target), or the "
        "hub id or folder of a sequence-classification model with one output",
    )
    reference: Literal["start", "previous"] = Field(
        "previous", description="log-ratios are taken to the last checkpoint, or to the model at the start"
    )

    @model_validator(mode="after")
    def _used(self) -> IterativeDpoOptions:
        if self.team:
            raise ValueError("team does nothing in iterative DPO, which has one reference; leave it out")
        if self.identical == "drop":
            raise ValueError(
                "identical: drop does nothing in iterative DPO, which pairs answers with each other; leave it out"
            )
        return self


class IterativeDpo:
    """Learn the model's best answers against its worst."""

    Options = IterativeDpoOptions
    tiny: ClassVar[dict[str, Any]] = {
        "iterations": 2,
        "reward": "{folder}/models/judge",
        "writing": {"max_new_tokens": 6},
    }
    sharding = frozenset({"zero2", "zero3", "fsdp2"})

    def __init__(self, options: IterativeDpoOptions) -> None:
        self.options = options

    @hookimpl
    def check(self, run: Run) -> None:
        check_reward(self.options.reward)

    @hookimpl
    def self_play(self, run: Run) -> SelfPlay:
        options = self.options
        # All checkpoints so far are players where the reference is the start: the oldest of them.
        return SelfPlay(
            options,
            self.loss,
            players=options.iterations if options.reference == "start" else 1,
            samples=options.samples,
            score=reward(options.reward),
            choose=best_and_worst,
            token_log_probs=token_log_probs(run),
        )

    def loss(self, batch: PairBatch) -> PairLoss:
        """Return DPO's loss of every pair."""
        beta, player = self.options.beta, -1 if self.options.reference == "start" else 0
        rows = dpo_loss(
            batch.chosen,
            batch.rejected,
            batch.reference_chosen[:, player],
            batch.reference_rejected[:, player],
            beta=beta,
        )
        return PairLoss(rows, metrics.pair_rewards(batch, beta, player) | metrics.log_probabilities(batch))


def best_and_worst(
    target: Sequence[int], samples: Sequence[Sample]
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Return the pair of the best and the worst of a prompt's samples, or none where all have one score.

    Of several best (or worst) the first counts. The target itself is no answer of the model's.
    """
    scores = [0.0 if sample.score is None else sample.score for sample in samples]
    if not samples or max(scores) == min(scores):
        return []
    best, worst = (samples[scores.index(extreme(scores))] for extreme in (max, min))
    return [(best.tokens, worst.tokens)]
