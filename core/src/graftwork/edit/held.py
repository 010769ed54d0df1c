"""How far a model has moved on text that has nothing to do with its edits: divergence and perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from graftwork.console import Console
from graftwork.transform.structure import find_layers, first_tensor, leave


@dataclass(frozen=True)
class Drift:
    """Mean KL(before || after) per predicted token (nats), and perplexity after over before; ``tokens`` counted."""

    divergence: float
    perplexity_ratio: float
    tokens: int


class Held:
    """Held-out windows and what the unedited model makes of them.

    Kept are the hidden states behind the last layer: logits are made of them again, as edits never touch final norm
    and head. That is the model's width per token, not its vocabulary.

    Args:
        model: unedited.
        windows: token ids (windows x window).
    """

    def __init__(self, model: Any, windows: torch.Tensor) -> None:
        self.model, self.windows = model, windows
        self.before = [self._states(row) for row in windows]

    def drift(self, console: Console | None = None) -> Drift:
        """Compare the model as it is now with the unedited one."""
        divergence = nll = old_nll = 0.0
        console = console or Console(enabled=False)
        with console.bar(len(self.windows), "drift", "window") as bar:
            for row, before in zip(self.windows, self.before, strict=True):
                # Window by window: logits are the largest tensors of all.
                old = leave(self.model, before)[0, :-1].float().log_softmax(-1)
                new = leave(self.model, self._states(row))[0, :-1].float().log_softmax(-1)
                divergence += float((old.exp() * (old - new)).sum(dtype=torch.float64))
                target = row[1:, None].to(old.device)
                nll -= float(new.gather(1, target).sum(dtype=torch.float64))
                old_nll -= float(old.gather(1, target).sum(dtype=torch.float64))
                bar.update(1)
        tokens = len(self.windows) * (self.windows.shape[1] - 1)
        ratio = (nll - old_nll) / tokens
        return Drift(divergence / tokens, math.exp(ratio) if ratio < 700 else math.inf, tokens)

    def _states(self, row: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        last = find_layers(self.model)[1][-1]
        handle = last.register_forward_hook(lambda _, __, output: seen.append(first_tensor(output)))
        device = self.model.get_input_embeddings().weight.device
        try:
            with torch.no_grad():
                self.model.base_model(input_ids=row[None].to(device), use_cache=False)
        finally:
            handle.remove()
        return seen[0]
