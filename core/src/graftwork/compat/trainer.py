"""Seams of ``transformers.Trainer`` that its public interface does not offer.

Tested with transformers 5.19 to 5.23. Both read attributes that the Trainer documents for
subclasses; the second wraps ``_load_from_checkpoint``. :mod:`graftwork.train.compose` also wraps ``_run_epoch``,
which older versions lack: there a run that was cut off right after its last step takes one more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import Trainer


TOKENS = "_total_train_tokens"
"""Where some trainers of TRL count tokens; they begin again at 0 when they resume."""


def loss_is_scaled(trainer: Trainer, num_items_in_batch: Any) -> bool:
    """Return whether ``compute_loss`` already normalised over the whole accumulated batch.

    Where it did not, ``training_step`` divides the loss by the number of accumulation steps.
    """
    if trainer.loss_is_scaled_for_ga is not None:
        return trainer.loss_is_scaled_for_ga
    return (trainer.model_accepts_loss_kwargs and num_items_in_batch is not None) or (
        trainer.compute_loss_func is not None
    )


@contextlib.contextmanager
def keep_adapter_activity(model: torch.nn.Module) -> Iterator[None]:
    """Restore which adapters are active and which parameters train, whatever the block did, or how it ended.

    Loading a checkpoint, the Trainer activates only the first adapter and makes all of it trainable, which undoes
    stacks of adapters and frozen parts of one adapter; PEFT does so where an adapter comes or goes. Adapters that
    the block adds must be gone at its end.
    """
    tuner: Any = getattr(model, "base_model", None)
    if not hasattr(model, "peft_config") or tuner is None:
        yield
        return
    active = list(tuner.active_adapters)
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        tuner.set_adapter(active)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains[name])
