"""MMER as a merge method: one merged difference, and per expert the bits that are its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from graftwork import UserError
from graftwork.console import Console
from graftwork.merge.experts import Experts
from graftwork.merge.masks import Bits, pack
from graftwork.merge.method import MergeMethod, Piece
from graftwork.merge.sums import row_sums
from graftwork.merge.trim import Trim
from graftwork_kernels import announce
from graftwork_kernels.ties_merge import ties_merge

from graftwork_mmer.options import MmerOptions
from graftwork_mmer.rules import RULES, ScaleSums, stored
from graftwork_mmer.sources import refuse_merged

MERGED, MASK = "merged", "mask."
FORMAT = "mmer/1"
_WORDS = {
    "mask_density": "share of entries that are in an expert's mask, mean over experts",
    "sign_conflicts": "share of the entries in masks where expert and merge point in opposite directions",
    "relative_l1": "sum of sizes of what the model for an expert misses, over that of the expert's difference",
}


class MmerMethod(MergeMethod):
    """Trim, elect, merge; then for expert i ``theta_0 + gamma_i m_i u`` with ``m_i`` of :mod:`graftwork_mmer.rules`.

    Masks are made for ``u`` as it is stored, after rounding: bits near the threshold would be wrong for what is loaded.
    """

    routes = True

    def __init__(self, options: MmerOptions, names: Sequence[str] = ()) -> None:
        """``names``: of the experts, where figures of each are wanted."""
        self.options = options
        self.names = tuple(names)
        self.trim = Trim(options.keep, options.trim_scope)
        self.dtype = torch.float32
        self.scales: dict[str, float] = {}
        self._last: tuple[Piece, torch.Tensor] | None = None

    def begin(self, experts: Experts, console: Console) -> None:
        """Find the thresholds and the scales.

        Raises:
            UserError: ``lam`` names other experts, or an expert that was written by a merge.
        """
        lam = self.options.lam
        if isinstance(lam, dict) and set(lam) != set(experts.names):
            raise UserError(
                f"mmer: lam is for {', '.join(sorted(lam))}, and the experts are {', '.join(experts.names)}"
            )
        if not self.options.allow_merged:
            refuse_merged(zip(experts.names, experts.refs, strict=True))
        self.dtype = torch.float32 if self.options.store == "float32" else experts.dtype
        self._last = None
        announce(console.say, "cpu")
        self.trim.begin(experts, console)
        self.scales = dict.fromkeys(experts.names, 1.0)
        if self.options.scale != "none":
            sums = [ScaleSums(self.options.scale) for _ in experts.names]
            for piece in experts.pieces(console, "find scales"):
                for index, one in enumerate(sums):
                    one.add(piece.deltas[index], self._kept(piece, index))
            self.scales = {name: one.value for name, one in zip(experts.names, sums, strict=True)}

    def merge(self, piece: Piece) -> torch.Tensor:
        """Return the merged difference u, as it is stored."""
        if self._last is None or self._last[0] is not piece:
            found = ties_merge(piece.deltas, *self.trim.limits(piece), self.options.aggregate)
            if self.options.alpha != 1:
                found = found * self.options.alpha
            self._last = (piece, stored(found, self.dtype))
        return self._last[1]

    def mask(self, piece: Piece, index: int) -> torch.Tensor:
        """Return the mask of one expert (bool, rows x columns)."""
        lam = self.options.lam
        threshold = lam[piece.experts[index]] if isinstance(lam, dict) else lam
        return RULES[self.options.rule](piece.deltas[index], self.merge(piece), threshold)

    def expert(self, piece: Piece, index: int) -> torch.Tensor:
        """Return u under the mask of one expert, scaled."""
        scale = self.scales[piece.experts[index]]
        kept = self._kept(piece, index)
        return kept if scale == 1 else kept * scale

    def beside(self, piece: Piece) -> Mapping[str, torch.Tensor | Bits]:
        """Return u and every expert's mask."""
        masks = {f"{MASK}{name}": pack(self.mask(piece, index)) for index, name in enumerate(piece.experts)}
        return {MERGED: self.merge(piece).to(self.dtype), **masks}

    def figures(self, piece: Piece) -> Mapping[str, tuple[float, float]]:
        """Return how dense masks are, how many bits are against the expert, and what is lost."""
        merged = self.merge(piece)
        found: dict[str, tuple[float, float]] = {}
        bits = conflicts = 0
        missed: list[float] = []
        own: list[float] = []
        for index, name in enumerate(piece.experts):
            mask, delta = self.mask(piece, index), piece.deltas[index]
            kept = int(mask.sum())
            bits += kept
            conflicts += int((mask & (delta.sign() != merged.sign())).sum())
            if name in self.names:
                found[f"density_{name}"] = (kept, mask.numel())
            missed += row_sums((self.expert(piece, index) - delta).abs())
            own += row_sums(delta.abs())
        return {
            **found,
            "mask_density": (bits, piece.deltas.numel()),
            "sign_conflicts": (conflicts, bits),
            "relative_l1": (math.fsum(missed), math.fsum(own)),
        }

    def words(self) -> Mapping[str, str]:
        """Return what the figures are."""
        own = {f"density_{name}": f"share of entries that are in the mask of '{name}'" for name in self.names}
        return {**_WORDS, **own}

    def manifest(self) -> Mapping[str, Any]:
        """Return the options and scales."""
        options = self.options.model_dump(exclude={"expand", "artefact"})
        return {"format": FORMAT, "options": options, "scales": self.scales}

    def bits_per_weight(self, experts: Experts) -> float:
        """Return base, u, and a bit per expert."""
        merged = 4 if self.options.store == "float32" else experts.item
        return 8.0 * (experts.item + merged) + len(experts.names)

    def _kept(self, piece: Piece, index: int) -> torch.Tensor:
        return torch.where(self.mask(piece, index), self.merge(piece), 0.0)
