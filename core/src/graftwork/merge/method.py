"""What a method of merging is: a function of rows of weights, for one merged model or for one model per expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from graftwork.merge.masks import Bits

if TYPE_CHECKING:
    from graftwork.console import Console
    from graftwork.merge.experts import Experts


@dataclass(frozen=True)
class Piece:
    """Rows of one parameter, in the base and in all experts.

    A parameter is a matrix here: its first axis is the rows, all others together are the columns; one with a single
    axis is one row and is never cut.

    Attributes:
        name: of the parameter in the base model, such as ``model.layers.3.mlp.up_proj.weight``.
        order: which parameter it is, counted over all that are merged.
        rows: of the matrix.
        experts: names, sorted; the order of ``deltas``.
        base: rows x columns, float32.
        deltas: experts x rows x columns, float32: expert minus base. They are shared; do not change them in place.
    """

    name: str
    order: int
    rows: slice
    experts: tuple[str, ...]
    base: torch.Tensor
    deltas: torch.Tensor

    @property
    def columns(self) -> int:
        return self.base.shape[1]

    @property
    def offset(self) -> int:
        """How many entries of the parameter come before this piece."""
        return self.rows.start * self.columns


class MergeMethod:
    """A way to merge experts that were made from the same base. Every plugin that merges has one.

    ``merge`` and ``expert`` are pure functions of the piece and of what ``begin`` found out, so that the result is the
    same for pieces of any size and after a kill. Rounding to the precision of the model happens behind them, once.

    Attributes:
        merges: whether there is one merged model (``merge``).
        routes: whether experts get weights of their own (``expert``), which someone must choose between.
    """

    merges = True
    routes = False

    def check(self, experts: Experts) -> None:
        """Refuse experts that the method is not for, by raising ``UserError``; read headers, not weights."""

    def begin(self, experts: Experts, console: Console) -> None:
        """Find out what is global, such as thresholds, from ``experts.pieces()``. Called once, also after a kill."""

    def merge(self, piece: Piece) -> torch.Tensor:
        """Return what is added to the base's rows to make the merged model (rows x columns, float32)."""
        raise NotImplementedError

    def expert(self, piece: Piece, index: int) -> torch.Tensor:
        """Return what is added to the base's rows to stand for expert ``index``. By default the merged model does."""
        return self.merge(piece)

    def beside(self, piece: Piece) -> Mapping[str, torch.Tensor | Bits]:
        """Return what is stored beside the model for these rows, by label: rows x anything, of any dtype, or bits.

        Every piece gives the same labels. Rows are joined; a label becomes a folder of safetensors with the
        parameters' names as keys.
        """
        return {}

    def figures(self, piece: Piece) -> Mapping[str, tuple[float, float]]:
        """Return figures for the report, each as (sum, count): over all pieces they are added and divided."""
        return {}

    def words(self) -> Mapping[str, str]:
        """Return what each figure is, in a few words."""
        return {}

    def manifest(self) -> Mapping[str, Any]:
        """Return what someone who reads the stored tensors must know, such as options; ready for JSON."""
        return {}

    def bits_per_weight(self, experts: Experts) -> float:
        """Return the bits per merged weight of all that must be kept to serve every expert.

        The base counts where it must be kept, too. By default the merged model replaces everything.
        """
        return 8.0 * experts.item
