"""Refuse self-play that cannot work, before weights are read."""

from __future__ import annotations

from typing import Any

from graftwork.errors import UserError
from graftwork.hookspecs import Adapter, SelfPlay, TrainingAlgorithm
from graftwork.models import is_encoder_decoder
from graftwork.run import Run
from graftwork.self_play.players import check_given


def self_play_algorithm() -> TrainingAlgorithm:
    """Return the trainer of pairs and its config class."""
    from trl.trainer.dpo_config import DPOConfig

    from graftwork.compat.pair_trainer import PairTrainer

    return TrainingAlgorithm(PairTrainer, DPOConfig)


def check_self_play(run: Run, owner: str, play: SelfPlay, adapter: Adapter | None, meta: Any) -> None:
    """Refuse what self-play is not made for.

    Raises:
        UserError: an encoder-decoder, an adapter that is another one for every task, fields of the trainer that
            would do nothing, an unusable team or server.
    """
    from graftwork.compat.pair_trainer import check_train_fields

    where = f"plugin '{owner}'"
    if run.job.algorithm not in ("sft", "dpo"):
        raise UserError(
            f"{where} brings a trainer of its own, so algorithm '{run.job.algorithm}' would not be used; leave it out"
        )
    if is_encoder_decoder(meta.config):
        raise UserError(
            f"{where}: self-play is for decoder-only models, and this one is an encoder-decoder "
            f"({meta.config.model_type})"
        )
    if adapter is not None and adapter.policy != "shared":
        makers = run.plugins.implements("adapter_config")
        whose = f"'{makers[0]}' brings one (hook adapter_config)" if makers else "the recipe's is one"
        who = f"plugins '{owner}' and '{makers[0]}' cannot be combined" if makers else where
        raise UserError(
            f"{who}: the iterations of self-play train one adapter (hook self_play), and {whose} of the policy "
            f"'{adapter.policy}', a new one for every task; use an adapter of the policy 'shared'"
        )
    check_train_fields(run.job.train, owner)
    check_given(play.options.team, run.job.model, adapter is not None)
    if play.options.writing.backend == "vllm":
        from graftwork.self_play.vllm import check

        check(play.options.writing, run, adapter)
