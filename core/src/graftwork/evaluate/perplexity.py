"""Perplexity of a text under a causal language model, in fixed windows without overlap."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwork.data.texts import text_windows
from graftwork.errors import UserError
from graftwork.evaluate.modes import evaluating
from graftwork.models import is_encoder_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_model(config: Any) -> None:
    """Raise ``UserError`` where perplexity has no meaning for a model of this config."""
    if is_encoder_decoder(config):
        raise UserError(
            f"perplexity on a text is that of a causal language model, and {config.model_type} is an "
            f"encoder-decoder; score it on tasks instead"
        )


def perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    window: int = 256,
    max_windows: int | None = None,
    batch_size: int = 4,
    progress: Callable[[int], Any] | None = None,
) -> dict[str, float | int]:
    """Return ``{"perplexity", "nll", "tokens"}``: nll is the mean per predicted token, perplexity its exp.

    ``path`` is a text file, or a ``.jsonl`` file of ``{"text"}`` items, which are joined by empty lines.
    Every window of ``window`` tokens predicts its last ``window - 1``; log-probabilities are taken in
    fp32. Figures compare only within one file, window and tokenizer.

    Raises:
        UserError: the file is missing, not UTF-8, or shorter than one window; or the model's own window is;
            or the model is an encoder-decoder.
    """
    check_model(model.config)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and window > longest:
        raise UserError(
            f"a perplexity window of {window} tokens does not fit the model's window of {longest}"
        )
    rows = text_windows(path, tokenizer, window, max_windows)
    total = 0.0
    with evaluating(model):
        for batch in rows.split(batch_size):
            batch = batch.to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            ).item()
            if progress:
                progress(len(batch))
    tokens = len(rows) * (window - 1)
    mean = total / tokens
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf, "nll": mean, "tokens": tokens}
