"""Keep exactly the largest entries of every expert, over the whole model or in every tensor by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from graftwork.console import Console
from graftwork.merge.experts import Experts
from graftwork.merge.method import Piece
from graftwork.merge.select import Cut, largest

Scope = Literal["model", "tensor"]


class Trim:
    """``ceil(keep * entries)`` entries of each expert, the largest; of equal ones the first by tensor and place."""

    def __init__(self, keep: float, scope: Scope = "model") -> None:
        self.keep, self.scope = keep, scope
        self._cuts: dict[str, list[Cut]] = {}

    def begin(self, experts: Experts, console: Console) -> None:
        """Find the thresholds, in two passes over the experts (none where all is kept)."""
        if self.keep == 1:
            return
        count = len(experts.names)
        if self.scope == "model":
            keep = math.ceil(self.keep * experts.count)
            cuts = largest(lambda: experts.pieces(console, "find thresholds"), keep, count)
            self._cuts = dict.fromkeys(experts.shapes, cuts)
            return
        with console.bar(len(experts.shapes), "find thresholds", "tensor") as bar:
            for name, (rows, columns) in experts.shapes.items():

                def again(name: str = name) -> Iterator[Piece]:
                    return experts.pieces_of(name)

                self._cuts[name] = largest(again, math.ceil(self.keep * rows * columns), count)
                bar.update(1)

    def __call__(self, piece: Piece) -> torch.Tensor:
        """Return the differences (experts x rows x columns), 0 where nothing is kept."""
        if self.keep == 1:
            return piece.deltas
        kept = torch.zeros_like(piece.deltas)
        for index, cut in enumerate(self._cuts[piece.name]):
            mask = cut.keeps(piece, index)
            kept[index][mask] = piece.deltas[index][mask]
        return kept
