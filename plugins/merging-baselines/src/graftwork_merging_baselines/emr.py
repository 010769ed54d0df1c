"""EMR-Merging: one unified difference, and a mask and a scale per expert. Huang et al., NeurIPS 2024."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from graftwork.console import Console
from graftwork.merge.experts import Experts
from graftwork.merge.masks import Bits, pack
from graftwork.merge.method import MergeMethod, Piece
from graftwork.merge.plugin import ExpandOptions, MergePlugin
from graftwork.merge.signs import disjoint, elect
from graftwork.merge.sums import row_sums


class EmrMethod(MergeMethod):
    """Elect ``u = g max_{tau_t g > 0} |tau_t|`` with ``g`` the sign of the sum; ``m_t = [tau_t g > 0]``.

    The scale of expert t is ``sum over tensors of mean |tau_t|`` over ``sum over tensors of mean |m_t u|``, which
    gives it the size of its own difference.
    """

    routes = True

    def __init__(self) -> None:
        self.scales: list[float] = []
        self.dtype = torch.float32

    def begin(self, experts: Experts, console: Console) -> None:
        """Find the scale of every expert."""
        self.dtype = experts.dtype
        own: list[list[float]] = [[] for _ in experts.names]
        masked: list[list[float]] = [[] for _ in experts.names]
        for piece in experts.pieces(console, "find scales"):
            count = math.prod(experts.shapes[piece.name])
            unified = self.merge(piece)
            for index, delta in enumerate(piece.deltas):
                own[index] += [size / count for size in row_sums(delta.abs())]
                masked[index] += [size / count for size in row_sums(self._masked(delta, unified).abs())]
        self.scales = [
            # Where no entry of an expert has the elected sign there is nothing to scale.
            math.fsum(one) / math.fsum(other) if any(other) else 1.0
            for one, other in zip(own, masked, strict=True)
        ]

    def merge(self, piece: Piece) -> torch.Tensor:
        """Return the unified difference, as it is stored."""
        # Without a threshold the steps of core are the faster ones on a CPU, where pieces are.
        return disjoint(piece.deltas, elect(piece.deltas), "max").to(self.dtype).float()

    def expert(self, piece: Piece, index: int) -> torch.Tensor:
        """Return the unified difference under the mask of one expert, scaled."""
        return self._masked(piece.deltas[index], self.merge(piece)) * self.scales[index]

    def beside(self, piece: Piece) -> Mapping[str, torch.Tensor | Bits]:
        """Return the unified difference and every expert's mask."""
        unified = self.merge(piece)
        masks = {
            f"mask.{name}": pack(piece.deltas[index] * unified > 0)
            for index, name in enumerate(piece.experts)
        }
        return {"merged": unified.to(self.dtype), **masks}

    def manifest(self) -> Mapping[str, Any]:
        """Return the scales, in the order of the experts."""
        return {"scales": self.scales}

    def bits_per_weight(self, experts: Experts) -> float:
        """Return base, unified difference and a bit per expert."""
        return 2 * 8.0 * experts.item + len(experts.names)

    @staticmethod
    def _masked(delta: torch.Tensor, unified: torch.Tensor) -> torch.Tensor:
        return torch.where(delta * unified > 0, unified, 0.0)


class Emr(MergePlugin):
    """Elect, mask, rescale."""

    name = "emr"
    Options = ExpandOptions

    @classmethod
    def method(cls, options: ExpandOptions, seed: int) -> EmrMethod:
        return EmrMethod()
