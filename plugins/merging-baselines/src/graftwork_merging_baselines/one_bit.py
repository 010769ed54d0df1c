"""1-bit differences: theta_0 + s_t sign(tau_t), a scale per matrix. After BitDelta, Liu et al., NeurIPS 2024."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from graftwork.console import Console
from graftwork.merge.experts import Experts
from graftwork.merge.masks import Bits, pack
from graftwork.merge.method import MergeMethod, Piece
from graftwork.merge.plugin import ExpandOptions, MergePlugin
from graftwork.merge.sums import row_sums


class OneBitMethod(MergeMethod):
    """Every expert by itself: the signs of its difference and, per tensor, ``s = mean |tau|``.

    A bit has no third value: an entry that did not change counts as negative.
    """

    merges = False
    routes = True

    def __init__(self) -> None:
        self.scales: dict[str, list[float]] = {}

    def begin(self, experts: Experts, console: Console) -> None:
        """Find the scale of every tensor of every expert."""
        sums: dict[str, list[list[float]]] = {}
        for piece in experts.pieces(console, "find scales"):
            mine = sums.setdefault(piece.name, [[] for _ in piece.experts])
            for values, delta in zip(mine, piece.deltas, strict=True):
                values.extend(row_sums(delta.abs()))
        for name, of_experts in sums.items():
            count = math.prod(experts.shapes[name])
            self.scales[name] = [math.fsum(values) / count for values in of_experts]

    def expert(self, piece: Piece, index: int) -> torch.Tensor:
        """Return the scaled signs of one expert's difference."""
        scale = self.scales[piece.name][index]
        return torch.where(piece.deltas[index] > 0, scale, -scale)

    def beside(self, piece: Piece) -> Mapping[str, torch.Tensor | Bits]:
        """Return every expert's signs: bit 1 is positive."""
        return {f"sign.{name}": pack(piece.deltas[index] > 0) for index, name in enumerate(piece.experts)}

    def manifest(self) -> Mapping[str, Any]:
        """Return the scales: by parameter, in the order of the experts."""
        return {"scales": self.scales}

    def bits_per_weight(self, experts: Experts) -> float:
        """Return the base and a bit per expert."""
        return 8.0 * experts.item + len(experts.names)


class OneBit(MergePlugin):
    """1-bit differences."""

    name = "one-bit"
    Options = ExpandOptions
    tiny: ClassVar[dict[str, Any]] = {"expand": "a"}

    @classmethod
    def method(cls, options: ExpandOptions, seed: int) -> OneBitMethod:
        return OneBitMethod()
