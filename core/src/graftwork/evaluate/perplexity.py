"""Perplexity of a text under a causal language model, in fixed windows without overlap."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwork.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.inference_mode()
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
    """Return ``{"perplexity", "nll", "tokens"}``: exp of the mean negative log-likelihood per predicted token.

    Every window of ``window`` tokens predicts its last ``window - 1``; log-probabilities are taken in
    fp32. Figures compare only within one file, window and tokenizer.

    Raises:
        UserError: the file is missing, not UTF-8, or shorter than one window.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"text file '{path}' does not exist") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"text file '{path}' cannot be read as UTF-8 text: {error}") from None
    # Long texts are tokenised whole on purpose; the warning about the model's window does not apply.
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    count = min(len(ids) // window, max_windows or len(ids))
    if count == 0:
        raise UserError(f"text file '{path}' has {len(ids)} tokens, fewer than one window of {window}")
    rows = ids[: count * window].reshape(count, window)
    was_training = model.training
    model.eval()
    total = 0.0
    for batch in rows.split(batch_size):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
        if progress:
            progress(len(batch))
    model.train(was_training)
    tokens = count * (window - 1)
    return {"perplexity": math.exp(total / tokens), "nll": total / tokens, "tokens": tokens}
