"""What the recursive cross-entropy adds to a trainer's own cross-entropy, from the forward pass that was just done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from graftwork import UserError
from graftwork.compat.fused_head import changes_logits
from graftwork.distributed import mean_over_ranks

from graftwork_bdq.loss import IGNORED, Sign, self_weighed


class RceTerm:
    """The mean of -S (symmetric) or +S (printed) over the labelled tokens of a batch; see :mod:`graftwork_bdq.loss`.

    The trainer's own loss is the cross-entropy, so their sum is the recursive one. Trainers may make no logits, so
    the decoder's last hidden states (b x l x d) are kept and multiplied with the head at the labelled positions.
    """

    def __init__(self, model: Any, delta: float, sign: Sign) -> None:
        self.base = _base(model)
        self.delta, self.factor = delta, -1.0 if sign == "symmetric" else 1.0
        self.hidden: torch.Tensor | None = None
        self._handle = self.base.get_decoder().register_forward_hook(self._see)

    @staticmethod
    def check(model: Any) -> None:
        """Refuse models whose logits are not hidden states times head.

        Raises:
            UserError: with the kind of model.
        """
        config = _base(model).config
        if config.is_encoder_decoder or changes_logits(config):
            raise UserError(
                f"plugins.bdq.loss_term needs logits that are the output embedding's own, and a {config.model_type} "
                f"model changes them; train without it"
            )

    def _see(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled() and module.training:
            self.hidden = output[0]

    def __call__(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the term.

        Raises:
            UserError: the batch has no labels, or the trainer does not call the decoder.
        """
        hidden, self.hidden = self.hidden, None
        labels = batch.get("labels")
        if labels is None or hidden is None or hidden.shape[:2] != labels.shape:
            raise UserError(
                "plugins.bdq.loss_term needs batches with labels for every position that the decoder sees; train with "
                "algorithm: sft"
            )
        next_tokens = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        counts = next_tokens != IGNORED
        logits = self.base.get_output_embeddings()(hidden[counts])
        rows = self_weighed(logits, next_tokens[counts].to(logits.device), delta=self.delta)
        return self.factor * mean_over_ranks(rows.sum(), counts.sum())

    def close(self) -> None:
        """Leave the model."""
        self._handle.remove()


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
