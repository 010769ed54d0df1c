"""Small methods for the tests; how a third party would write one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from graftwork.merge.masks import Bits, pack
from graftwork.merge.method import MergeMethod, Piece
from graftwork.merge.select import Cut, largest
from graftwork.merge.signs import disjoint, elect, total


class Mean(MergeMethod):
    """The mean of the experts, scaled."""

    def __init__(self, alpha: float = 1.0) -> None:
        self.alpha = alpha

    def merge(self, piece: Piece) -> torch.Tensor:
        return (self.alpha * total(piece.deltas) / len(piece.experts)).float()


class Trimmed(MergeMethod):
    """TIES with half of all entries, with masks beside the model and a route for every expert."""

    routes = True
    cuts: list[Cut]

    def begin(self, experts, console) -> None:
        self.cuts = largest(experts.pieces, experts.count // 2, len(experts.names))

    def merge(self, piece: Piece) -> torch.Tensor:
        kept = torch.stack(
            [
                torch.where(cut.keeps(piece, index), piece.deltas[index], 0.0)
                for index, cut in enumerate(self.cuts)
            ]
        )
        return disjoint(kept, elect(kept))

    def expert(self, piece: Piece, index: int) -> torch.Tensor:
        return torch.where(self.mask(piece, index), piece.deltas[index], 0.0)

    def mask(self, piece: Piece, index: int) -> torch.Tensor:
        return piece.deltas[index] * self.merge(piece) > 0

    def beside(self, piece: Piece) -> Mapping[str, torch.Tensor | Bits]:
        masks = {f"mask.{name}": pack(self.mask(piece, index)) for index, name in enumerate(piece.experts)}
        return {"merged": self.merge(piece), **masks}

    def figures(self, piece: Piece) -> Mapping[str, tuple[float, float]]:
        return {"kept": (float(self.merge(piece).count_nonzero()), piece.base.numel())}

    def words(self) -> Mapping[str, str]:
        return {"kept": "share of entries that are changed"}


class Own(MergeMethod):
    """Every expert as it is."""

    merges = False
    routes = True

    def expert(self, piece: Piece, index: int) -> torch.Tensor:
        return piece.deltas[index].clone()
