"""The hook of self-play."""

from __future__ import annotations

from graftwork import PairLoss, SelfPlay, hookimpl
from graftwork.self_play.options import SelfPlayOptions
from torch.nn.functional import softplus

from graftwork_frozen import saw


class PlayOptions(SelfPlayOptions):
    """Options of frozen-play."""


class Play:
    """A duel of targets with what the model writes."""

    Options = PlayOptions

    def __init__(self, options: PlayOptions) -> None:
        self.options = options

    @hookimpl
    def self_play(self, run):
        saw("self_play")

        def loss(batch):
            saw("pair_loss", (batch.iteration, len(batch.chosen)))
            reference = batch.reference_chosen[:, 0] - batch.reference_rejected[:, 0]
            margin = batch.chosen - batch.rejected - reference
            return PairLoss(softplus(-0.1 * margin), {"frozen/margin": margin})

        return SelfPlay(
            self.options,
            loss,
            players=1,
            rounds=1,
            samples=1,
            score=lambda samples: [float(len(one.text)) for one in samples],
            choose=lambda target, samples: [(target, one.tokens) for one in samples],
            inspect=lambda chosen, rejected: [f"frozen saw {chosen.shape[0]} pairs"],
        )
