"""All hooks of writing text."""

from __future__ import annotations

import contextlib

import torch
from graftwork import Combiner, hookimpl
from transformers import LogitsProcessor

from graftwork_frozen import saw

TOKEN = 3
"""The only one that frozen-decoding writes."""


class Only(LogitsProcessor):
    """Rules out all tokens but one."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        saw("processed", tuple(scores.shape))
        found = torch.full_like(scores, -torch.inf)
        found[:, self.token] = 0
        return found


class Decoding:
    """Writes the same token again and again, and says so."""

    def __init__(self, options) -> None:
        self.steps = 0

    @hookimpl
    def logits_processors(self, run, model):
        saw("logits_processors", model.config.model_type)
        return [Only(TOKEN)]

    @hookimpl
    def generation_context(self, run, model):
        @contextlib.contextmanager
        def context():
            saw("generation_context", "entered")
            yield
            saw("generation_context", "left")

        return context()

    @hookimpl
    def before_forward(self, run, coming):
        saw("before_forward", (coming.step, coming.prefill, coming.predicts))
        self.steps += 1

    @hookimpl
    def generation_notes(self, run):
        saw("generation_notes", self.steps)
        return [f"frozen passes: {self.steps}"]


class Pairs:
    """Answers as if there were no context."""

    def __init__(self, options) -> None:
        pass

    @hookimpl
    def combiner(self, run, model):
        saw("combiner", model.config.model_type)
        return Combiner("frozen", lambda main, contrast: contrast.masked_fill(main == -torch.inf, -torch.inf))
