"""The model's predictions on answer tokens, now and as they were, and their distance (LwF's mathematics)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from graftwork import UserError
from graftwork.distributed import mean_over_ranks
from graftwork.evaluate.modes import evaluating
from torch.nn import functional as F

# What a model may do to the output of its embedding: with any of these, hidden state times embedding are not
# its logits.
SCALES = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)
INPUTS = ("input_ids", "attention_mask", "position_ids", "labels")


def scaled_logits(config: Any) -> str | None:
    """Return the field of a model's ``config`` that scales or bends its logits, or None."""
    text = config.get_text_config()
    return next((field for field in SCALES if getattr(text, field, None) not in (None, 1, 1.0)), None)


def answers(labels: torch.Tensor, encoder_decoder: bool = False) -> torch.Tensor:
    """Return True (b x l) where a position predicts an answer token.

    A decoder predicts the label one further on; an encoder-decoder's inputs are shifted already.
    """
    return labels != -100 if encoder_decoder else F.pad(labels[:, 1:] != -100, (0, 1))


def distance(old: torch.Tensor, new: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return ``T^2 KL(softmax(old/T) || softmax(new/T))``, the mean over the rows of two logit matrices (n x V).

    The rows are those of all processes, and the mean of what they return is that mean. Hinton et al. 2015 for
    temperature and T^2; Li and Hoiem 2016 for the use. No rows: 0, with a gradient.
    """
    before = F.log_softmax(old.float() / temperature, -1)
    now = F.log_softmax(new.float() / temperature, -1)
    total = F.kl_div(now, before, reduction="sum", log_target=True)
    return temperature**2 * mean_over_ranks(total, len(new))


class Watch:
    """Keeps what enters the output embedding (b x l x d) in the newest forward pass of a model.

    That is the last hidden state of a decoder, whose trainer may multiply it with the embedding itself, in
    pieces. An encoder-decoder calls its embedding, and may scale the hidden state before (T5), so there the
    embedding's own input is taken.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.encoder_decoder = bool(self.base.config.is_encoder_decoder)
        self.last: torch.Tensor | None = None
        self.handle = self._hook(self._see)

    def _hook(self, see: Callable[[torch.nn.Module, torch.Tensor], None]) -> Any:
        if self.encoder_decoder:
            head = self.base.get_output_embeddings()
            return head.register_forward_pre_hook(lambda module, args: see(module, args[0]))
        return self.base.get_decoder().register_forward_hook(lambda module, _, output: see(module, output[0]))

    def _see(self, module: torch.nn.Module, hidden: torch.Tensor) -> None:
        # Other passes, such as generation or another method's statistics, are none of the loss.
        if torch.is_grad_enabled() and module.training:
            self.last = hidden

    def close(self) -> None:
        self.handle.remove()

    def new_logits(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the logits (n x V) of the training pass just done, at the n answer positions of ``labels``."""
        hidden = self.last
        if hidden is None:
            raise UserError(
                "plugin 'lwf' saw no forward pass of the decoder in this step; the trainer does not call the model "
                "itself, train with algorithm: sft or seq2seq"
            )
        logits = self._logits(hidden, labels, self.base.get_output_embeddings())
        self.last = None
        return logits

    def old_logits(self, batch: Mapping[str, Any], before: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the same of the model with the parameters ``before``, without dropout and gradients."""
        caught: list[torch.Tensor] = []
        handle = self._hook(lambda _, hidden: caught.append(hidden))
        inputs = {key: batch[key] for key in INPUTS if key in batch}
        try:
            with evaluating(self.model):
                torch.func.functional_call(self.model, dict(before), (), {**inputs, "use_cache": False})
                head = self.base.get_output_embeddings()
                return self._logits(caught[0], batch["labels"], head, self._of(head, before))
        finally:
            handle.remove()

    def _of(self, head: torch.nn.Module, before: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return those of ``before`` that are the head's, by its own names: tied weights have one name only."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        mine = {key: names[id(parameter)] for key, parameter in head.named_parameters()}
        return {key: before[name] for key, name in mine.items() if name in before}

    def _logits(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        head: torch.nn.Module,
        changed: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if hidden.shape[:2] != labels.shape:
            raise UserError(
                f"plugin 'lwf': the model sees {tuple(hidden.shape[:2])} positions and the batch has labels for "
                f"{tuple(labels.shape)}; an adapter that adds virtual tokens cannot be distilled, take LORA"
            )
        chosen = hidden[answers(labels, self.encoder_decoder)].to(next(head.parameters()).dtype)
        logits = torch.func.functional_call(head, dict(changed or {}), (chosen,))
        bias = getattr(self.base, "final_logits_bias", None)
        return logits if bias is None else logits + bias
