"""Which positions are the prompt: what the gates may see.

In training the labels tell (-100 on attended positions is the prompt), in generation everything that is
there before the first new token. Answers never reach the router, so it behaves the same in both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from graftwork import UserError
from torch import nn


@dataclass
class Pass:
    """A forward pass: what is its prompt and what it attends to (b x l; None: everything).

    ``reuse``: it continues a cached sequence, so the gates of its prompt stay.
    """

    mask: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    reuse: bool = False


class PromptContext:
    """Shared by all routers of a model; filled by a pre-hook of the model's forward pass.

    The last pass with gradients and the last one without are kept apart: checkpointed layers run once more in the
    backward pass, and another method may have asked the model for something without gradients in between.
    """

    def __init__(self) -> None:
        self._passes = {True: Pass(), False: Pass()}
        self._given: torch.Tensor | None = None
        self._fixed: torch.Tensor | None = None
        self._fixing = False

    def give(self, mask: torch.Tensor) -> None:
        """Use ``mask`` (b x l, True on prompt tokens) for the next forward pass."""
        self._given = mask

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Pre-hook of the model: decide what the prompt of this pass is."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        labels = kwargs.get("labels")
        attended = kwargs.get("attention_mask")
        given, self._given = self._given, None
        now = self._passes[torch.is_grad_enabled()] = Pass()
        now.reuse = cache is not None and cache.get_seq_length() > 0
        now.attended = attended if attended is not None and attended.dim() == 2 else None
        if now.reuse:
            return
        if given is not None:
            now.mask = given.bool()
        elif self._fixed is not None and ids is not None:
            # Without a cache every step sees the whole text again; what was added since is no prompt.
            now.mask = nn.functional.pad(self._fixed, (0, ids.shape[1] - self._fixed.shape[1]))
        elif labels is not None:
            now.mask = prompt_mask(labels, now.attended)
        else:
            now.mask = None if now.attended is None else now.attended.bool()
            if self._fixing and ids is not None:
                self._fixed = torch.ones_like(ids).bool() if now.mask is None else now.mask

    @property
    def now(self) -> Pass:
        """The pass that is being computed."""
        return self._passes[torch.is_grad_enabled()]

    def prompt(self, hidden: torch.Tensor, fallback: str) -> torch.Tensor:
        """Return the prompt mask (b x l) of this pass for hidden states (b x l x d).

        Rows without any prompt token take the first half of their attended tokens, or are refused.
        """
        mask = self.now.mask
        if mask is None:
            return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if mask.shape != hidden.shape[:2]:
            raise UserError(
                f"SpaRTA: the prompt mask covers {tuple(mask.shape)} positions, the batch has "
                f"{tuple(hidden.shape[:2])}; packed or padding-free batches need router: off"
            )
        empty = ~mask.any(1)
        if not empty.any():
            return mask
        if fallback == "refuse":
            raise UserError(
                "SpaRTA: a row of the batch has no prompt token, so its gate has nothing to look at; "
                "set prompt_fallback: half or train on prompt and completion"
            )
        attended = self.attended(hidden)
        half = attended.cumsum(1) <= (attended.sum(1, keepdim=True) + 1) // 2
        return torch.where(empty[:, None], attended & half, mask)

    def attended(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the attention mask (b x l) of this pass, all True where none was given."""
        attended = self.now.attended
        if attended is None or attended.shape != hidden.shape[:2]:
            return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return attended.bool()

    @contextlib.contextmanager
    def generation(self) -> Iterator[None]:
        """Hold the prompt of the first pass for all that follow, cached or not."""
        self._fixing, self._fixed = True, None
        try:
            yield
        finally:
            self._fixing, self._fixed = False, None
            self._passes = {True: Pass(), False: Pass()}


def prompt_mask(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return True where a position is attended and comes before the row's first answer token.

    Positions after the first answer token are no prompt even where their label is -100, as in the
    later turns of a chat.
    """
    before = (labels != -100).cumsum(1) == 0
    answered = (labels != -100).any(1, keepdim=True)
    mask = before & answered
    return mask if attention_mask is None else mask & attention_mask.bool()
