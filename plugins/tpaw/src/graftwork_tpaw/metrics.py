"""What the losses log: names are ``group/line``, and the report draws a chart per group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from graftwork_tpaw.loss import TeamTerms

if TYPE_CHECKING:
    from graftwork import PairBatch


def log_probabilities(batch: PairBatch) -> dict[str, torch.Tensor]:
    """Return the answers' log-probabilities per token (B each): of the target, and of the generation if any."""
    found = {"log-probability/target": batch.chosen.detach() / batch.chosen_tokens}
    if len(batch.rejected):
        found["log-probability/generated"] = batch.rejected.detach() / batch.rejected_tokens
    return found


def rewards(target: torch.Tensor, generated: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return implicit rewards and their margin (B each). Where self-play collapses, that of the target sinks."""
    target, generated = target.detach(), generated.detach()
    return {"reward/target": target, "reward/generated": generated, "reward/margin": target - generated}


def pair_rewards(batch: PairBatch, beta: float, player: int) -> dict[str, torch.Tensor]:
    """Return the rewards of a batch by one player: ``beta`` times the log-ratios to it."""
    return rewards(
        beta * (batch.chosen - batch.reference_chosen[:, player]),
        beta * (batch.rejected - batch.reference_rejected[:, player]),
    )


def team(terms: TeamTerms) -> dict[str, torch.Tensor]:
    """Return every player's weight and how many of its targets it boosts, by age; rewards by the newest player.

    The entropy of the weights is in nats: log J where all players count the same, 0 where one has all.
    """
    weights, boosted = terms.player_weights, (terms.target_weights > 1).to(terms.player_weights.dtype)
    found = {f"player weight/age {age}": weights[:, age] for age in range(weights.shape[1])}
    found["player weight/entropy"] = torch.special.entr(weights).sum(1)
    found |= {f"boosted/age {age}": boosted[:, age] for age in range(weights.shape[1])}
    return found | rewards(terms.reward_target[:, 0], terms.reward_generated[:, 0])
