"""Self-play from a model's own SFT data: the losses of TPAW, SPIN, iterative DPO and continued SFT as functions."""

from graftwork_tpaw.loss import (
    TeamTerms,
    dpo_loss,
    dpop_loss,
    player_weights,
    sft_loss,
    spin_loss,
    target_weights,
    team_loss,
    team_terms,
)

__all__ = [
    "TeamTerms",
    "dpo_loss",
    "dpop_loss",
    "player_weights",
    "sft_loss",
    "spin_loss",
    "target_weights",
    "team_loss",
    "team_terms",
]
