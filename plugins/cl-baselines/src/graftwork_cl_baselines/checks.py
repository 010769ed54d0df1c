"""What several of the methods must refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graftwork import UserError

if TYPE_CHECKING:
    from graftwork.run import Run
    from transformers import Trainer

SPLIT = (
    "needs whole parameters in every process, which {what} splits; train with plain data parallelism instead"
)


def refuse_split_fields(plugin: str, run: Run) -> None:
    """Refuse ``train:`` fields that split parameters over processes."""
    for field in ("deepspeed", "fsdp"):
        if run.job.train.get(field):
            raise UserError(f"plugin '{plugin}' {SPLIT.format(what=f'train.{field}')}")


def refuse_split_trainer(plugin: str, trainer: Trainer) -> None:
    """Refuse the same where the launcher's own settings turned it on."""
    for what, on in (("DeepSpeed", trainer.is_deepspeed_enabled), ("FSDP", trainer.is_fsdp_enabled)):
        if on:
            raise UserError(f"plugin '{plugin}' {SPLIT.format(what=what)}")


def refuse_field(plugin: str, run: Run, field: str, why: str) -> None:
    """Refuse ``train.<field>``; ``why`` ends the sentence."""
    if run.job.train.get(field):
        raise UserError(f"plugin '{plugin}': {why}; remove train.{field}")
