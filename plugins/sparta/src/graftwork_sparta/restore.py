"""Stochastic restoration (lineage code, not in SpaRTA's abstract; off by default)."""

from __future__ import annotations

import torch
from torch import nn


class Restoration:
    """Reset each trainable entry, with a small probability, to its value at the start of the task.

    Runs after every ``every`` optimizer steps. The draws depend on seed and step alone, so a resumed run
    repeats them; the starting values are part of the plugin's state.
    """

    def __init__(self, every: int, probability: float, seed: int) -> None:
        self.every = every
        self.probability = probability
        self.seed = seed
        self.start: dict[str, torch.Tensor] = {}
        self.step = 0

    def begin(self, model: nn.Module) -> None:
        """Remember where the task starts from."""
        self.step = 0
        self.start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        self.step += 1
        if self.step % self.every:
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        for name, parameter in model.named_parameters():
            if name in self.start:
                draw = torch.rand(parameter.shape, generator=generator) < self.probability
                parameter.copy_(
                    torch.where(draw.to(parameter.device), self.start[name].to(parameter), parameter)
                )
