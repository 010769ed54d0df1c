"""When an answer is over."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer of ``model``; none where neither it nor the tokenizer has any."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])


def until_end(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """Return ``tokens`` up to the first of ``ends``, which stays."""
    for place, token in enumerate(tokens):
        if token in ends:
            return list(tokens[: place + 1])
    return list(tokens)


class FirstLine(StoppingCriteria):
    """Stop a row once it has written a line break after some text. ``begin``: where the answers begin."""

    def __init__(self, tokenizer: Any, begin: int) -> None:
        self.tokenizer = tokenizer
        self.begin = begin

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.begin :], skip_special_tokens=True)
        return torch.tensor(["\n" in text.lstrip() for text in texts], device=input_ids.device)
