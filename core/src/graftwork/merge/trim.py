"""Keep the largest entries of every expert, over the whole model or in every tensor by itself."""

from __future__ import annotations

import math
from typing import Literal

import torch

from graftwork.console import Console
from graftwork.merge.experts import Experts
from graftwork.merge.method import Piece
from graftwork.merge.select import Cut, largest

Scope = Literal["model", "tensor"]


class Trim:
    """Exactly ``ceil(keep * entries)`` entries of each expert, the largest by size; of equal ones the first.

    ``scope``: entries are those of the whole model, or of each tensor.
    """

    def __init__(self, keep: float, scope: Scope = "model") -> None:
        self.keep, self.scope = keep, scope
        self._cuts: list[Cut] = []
        self._by_tensor: dict[str, list[Cut]] = {}

    def begin(self, experts: Experts, console: Console) -> None:
        """Find the thresholds."""
        if self.keep == 1:
            return
        count = len(experts.names)
        if self.scope == "model":
            self._cuts = largest(
                lambda: experts.pieces(console, "find thresholds"),
                math.ceil(self.keep * experts.count),
                count,
            )
            return
        with console.bar(len(experts.shapes), "find thresholds", "tensor") as bar:
            for name, (rows, columns) in experts.shapes.items():
                keep = math.ceil(self.keep * rows * columns)
                self._by_tensor[name] = largest(experts.passes_of(name), keep, count)
                bar.update(1)

    def limits(self, piece: Piece) -> tuple[list[float], list[int]] | tuple[None, None]:
        """Return what is kept of a piece, for code that trims and merges at once.

        Per expert the threshold, and how many of the piece's entries, from its first, are kept where they are exactly
        as large; nothing where all is kept.
        """
        if self.keep == 1:
            return None, None
        cuts = self._cuts or self._by_tensor[piece.name]
        return [cut.value for cut in cuts], [cut.end(piece) for cut in cuts]

    def __call__(self, piece: Piece) -> torch.Tensor:
        """Return the differences (experts x rows x columns) with zeros where nothing is kept."""
        if self.keep == 1:
            return piece.deltas
        cuts = self._cuts or self._by_tensor[piece.name]
        kept = [
            torch.where(cut.keeps(piece, index), piece.deltas[index], 0.0) for index, cut in enumerate(cuts)
        ]
        return torch.stack(kept)
