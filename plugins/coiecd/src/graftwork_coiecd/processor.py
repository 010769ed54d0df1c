"""COIECD as a logits processor for ``model.generate``, without the rest of Graftwork."""

from __future__ import annotations

from typing import Any

import torch
from graftwork import UserError
from graftwork.generate.paired import Stream
from graftwork.generate.passes import inner_model
from graftwork.models import is_encoder_decoder
from transformers import DynamicCache, LogitsProcessor

from graftwork_coiecd.options import validated
from graftwork_coiecd.scores import Coiecd


class CoiecdLogitsProcessor(LogitsProcessor):
    """Run the prompt without its context beside ``generate`` and score with both.

    ``prior_ids``, ``prior_mask``: B x T', the prompts without context, padded on the left; row k belongs to
    row k of what ``generate`` gets. ``options`` are those of
    :class:`graftwork_coiecd.options.CoiecdOptions`, such as alpha and ratio::

        processor = CoiecdLogitsProcessor(model, prior["input_ids"], prior["attention_mask"], alpha=1.0)
        model.generate(**prompts, logits_processor=[processor])

    One forward pass of the model a step more. An object serves any number of ``generate`` calls with the same
    prompts without context, one after another: it begins anew with every prompt that does not go on where the
    last call stopped. ``reset()`` makes it begin anew in any case.

    ``generate`` applies its own penalties (repetition_penalty, bad_words_ids, ...) before this, so to the
    logits with context alone; where you need them after it, use the plugin.

    Raises:
        UserError: bad options, a prompt padded on the right, an encoder-decoder; when called, another number
            of rows than prompts without context (beam search, several sequences a prompt).
    """

    # Rows of a continuous batch are at different steps of different requests.
    supports_continuous_batching = False

    def __init__(
        self, model: Any, prior_ids: torch.Tensor, prior_mask: torch.Tensor | None = None, **options: Any
    ) -> None:
        if is_encoder_decoder(model.config):
            raise UserError(f"COIECD needs a decoder-only model; {model.config.model_type} has an encoder")
        self.model = inner_model(model)
        self.prior_ids = prior_ids
        self.prior_mask = torch.ones_like(prior_ids) if prior_mask is None else prior_mask
        _check_left_padded(prior_ids, self.prior_mask)
        self.method: Coiecd = validated(options).method
        self.reset()

    def reset(self) -> None:
        """Forget the text that was generated so far."""
        self.stream: Stream | None = None
        self.prompt = self.seen = self.prior_ids[:, :0]

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores, B x V; ``input_ids`` is B x t with the prompt, ``scores`` the logits B x V."""
        if len(input_ids) != len(self.prior_ids):
            raise UserError(
                f"COIECD got {len(input_ids)} rows and has {len(self.prior_ids)} prompts without context; it takes "
                f"one text a prompt, so no num_beams and no num_return_sequences"
            )
        if self._goes_on(input_ids):
            assert self.stream is not None
            self.stream.append(input_ids[:, -1])
        else:
            self._begin(input_ids)
        self.seen = input_ids
        assert self.stream is not None
        prior = self.stream.forward().to(scores.device)
        return self.method.scores(scores.float(), prior).to(scores.dtype)

    def _goes_on(self, ids: torch.Tensor) -> bool:
        """Return whether ``ids`` is the text of the last call and one token.

        Raises:
            UserError: the same prompt with another continuation: rows were exchanged.
        """
        if self.stream is None or ids.shape[1] != self.seen.shape[1] + 1:
            return False
        if torch.equal(ids[:, :-1], self.seen):
            return True
        begin = self.prompt.shape[1]
        if torch.equal(ids[:, :begin], self.prompt):
            raise UserError(
                "COIECD's rows go on with another text than they had, as in beam search, which it does not "
                "support; decode greedily or sample, or call reset() before another text"
            )
        return False

    def _begin(self, ids: torch.Tensor) -> None:
        self.prompt = ids
        device = ids.device
        self.stream = Stream(
            self.model,
            self.prior_ids.to(device),
            self.prior_mask.to(device),
            DynamicCache(config=self.model.config),
            slice(0, 0),
            slice(0, len(ids)),
        )


def _check_left_padded(ids: torch.Tensor, mask: torch.Tensor) -> None:
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise UserError(
            f"prior_ids and prior_mask are B x T of equal shape, not {tuple(ids.shape)} and {tuple(mask.shape)}"
        )
    if (mask[:, 1:] < mask[:, :-1]).any():
        raise UserError(
            "the prompts without context are padded on the right; set tokenizer.padding_side = 'left'"
        )
    if not ids.shape[1] or not mask[:, -1].all():
        raise UserError("a prompt without context is empty; give the question")
