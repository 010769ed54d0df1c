"""Rounding of single weights and of pairs of factors, as it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from graftwork.transform.feedback import round_with_feedback
from graftwork.transform.quantizer import Quantized, quantize_weight
from graftwork.transform.scheme import WeightScheme

Stored = torch.Tensor | Quantized


@dataclass(frozen=True)
class Rounder:
    """Rounds weights with error feedback (``gptq``), to the nearest (``rtn``), or not at all (``none``, 16 bits)."""

    quantizer: Literal["gptq", "rtn", "none"]
    scheme: WeightScheme
    damp: float = 0.01

    @property
    def rounds(self) -> bool:
        return self.quantizer != "none" and self.scheme.rounds

    @property
    def judge(self) -> Rounder:
        """Return what stands for the plugin that rounds later, where this one does not: rounding to the nearest."""
        return Rounder("rtn", self.scheme, self.damp) if self.quantizer == "none" else self

    def __call__(self, weight: torch.Tensor, moments: torch.Tensor, name: str = "") -> Stored:
        """Return a weight (m x n) as it is stored; ``moments`` (n x n) are those of its inputs."""
        if not self.rounds:
            return weight
        if self.quantizer == "rtn":
            return quantize_weight(weight, self.scheme, name)
        return round_with_feedback(weight, moments, self.scheme, damp=self.damp, name=name)

    def pair(
        self, left: torch.Tensor, right: torch.Tensor, moments: torch.Tensor, name: str = ""
    ) -> tuple[Stored, Stored]:
        """Return both factors as they are stored; the left one sees what the rounded right one makes."""
        stored = self(right, moments, f"{name}.0")
        wide, moments = values(stored).double(), moments.double()
        return self(left, wide @ moments @ wide.T, f"{name}.1"), stored


def values(stored: Stored) -> torch.Tensor:
    """Return a stored weight as numbers."""
    return stored.dequantized() if isinstance(stored, Quantized) else stored
