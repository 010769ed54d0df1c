"""When an answer is over."""

from __future__ import annotations

from typing import Any

import torch
from transformers import StoppingCriteria


class FirstLine(StoppingCriteria):
    """Stop a row once it has written a line break after some text. ``begin``: where the answers begin."""

    def __init__(self, tokenizer: Any, begin: int) -> None:
        self.tokenizer = tokenizer
        self.begin = begin

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.begin :], skip_special_tokens=True)
        return torch.tensor(["\n" in text.lstrip() for text in texts], device=input_ids.device)
