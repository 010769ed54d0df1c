"""TALL masks and Consensus merging: which merged entries are an expert's own, and which are shared.

Wang et al., ICML 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from graftwork import UserError
from graftwork.console import Console
from graftwork.merge.experts import Experts
from graftwork.merge.masks import Bits, pack
from graftwork.merge.method import MergeMethod, Piece
from graftwork.merge.plugin import ExpandOptions, MergePlugin
from graftwork.merge.signs import total
from graftwork.merge.trim import Trim
from graftwork_kernels import announce
from graftwork_kernels.ties_merge import ties_merge
from pydantic import Field, field_validator


class ConsensusOptions(ExpandOptions):
    """Options of TALL masks and Consensus."""

    lam: float | dict[str, float] = Field(
        0.4, description="threshold of the masks, for all or per expert; larger ones keep less"
    )
    agree: int = Field(
        2, ge=0, description="the merged model keeps entries that are in so many masks; 0: all entries"
    )
    alpha: float = Field(0.4, ge=0, description="scale of the merged difference in the one merged model")
    merge: Literal["sum", "ties"] = Field(
        "sum", description="the merged difference: sum of all, or TIES by sum"
    )
    keep: float = Field(0.2, gt=0, le=1, description="share of entries that TIES keeps")
    store_masks: bool = Field(False, description="store the merged difference and all masks beside the model")

    @field_validator("lam")
    @classmethod
    def _positive(cls, value: float | dict[str, float]) -> float | dict[str, float]:
        if any(one <= 0 for one in (value.values() if isinstance(value, dict) else (value,))):
            raise ValueError("is above 0")
        return value


class ConsensusMethod(MergeMethod):
    """Masks ``m_t = [ |tau_t| > lam |tau_MT - tau_t| ]`` of the merged difference ``tau_MT``.

    The merged model adds ``alpha`` times the entries that are in ``agree`` masks or more; expert t gets
    ``m_t * tau_MT``, unscaled.
    """

    routes = True

    def __init__(self, options: ConsensusOptions) -> None:
        self.options = options
        self.trim = Trim(options.keep if options.merge == "ties" else 1)
        self.dtype = torch.float32

    def begin(self, experts: Experts, console: Console) -> None:
        """Find the thresholds of TIES."""
        lam = self.options.lam
        if isinstance(lam, dict) and set(lam) != set(experts.names):
            raise UserError(
                f"consensus: lam is for {', '.join(sorted(lam))}, and the experts are {', '.join(experts.names)}"
            )
        self.dtype = experts.dtype
        if self.options.merge == "ties":
            announce(console.say, "cpu")
        self.trim.begin(experts, console)

    def merge(self, piece: Piece) -> torch.Tensor:
        """Return the merged difference where enough experts agree."""
        merged = self._merged(piece)
        if not self.options.agree:
            return merged * self.options.alpha
        votes = torch.zeros_like(merged)
        for index in range(len(piece.experts)):
            votes += self._mask(piece, merged, index)
        return torch.where(votes >= self.options.agree, merged * self.options.alpha, 0.0)

    def expert(self, piece: Piece, index: int) -> torch.Tensor:
        """Return the merged difference under the mask of one expert."""
        merged = self._merged(piece)
        return torch.where(self._mask(piece, merged, index), merged, 0.0)

    def beside(self, piece: Piece) -> Mapping[str, torch.Tensor | Bits]:
        """Return the merged difference and every expert's mask, where asked for."""
        if not self.options.store_masks:
            return {}
        merged = self._merged(piece)
        masks = {
            f"mask.{name}": pack(self._mask(piece, merged, index)) for index, name in enumerate(piece.experts)
        }
        return {"merged": merged.to(self.dtype), **masks}

    def figures(self, piece: Piece) -> Mapping[str, tuple[float, float]]:
        """Return how many entries are in a mask, over all experts."""
        merged = self._merged(piece)
        kept = sum(int(self._mask(piece, merged, index).sum()) for index in range(len(piece.experts)))
        return {"mask_density": (kept, piece.deltas.numel())}

    def words(self) -> Mapping[str, str]:
        """Return what the figures are."""
        return {"mask_density": "share of entries that are in an expert's mask"}

    def manifest(self) -> Mapping[str, Any]:
        """Return the options."""
        return {"options": self.options.model_dump()}

    def bits_per_weight(self, experts: Experts) -> float:
        """Return base, merged difference and a bit per expert."""
        return 2 * 8.0 * experts.item + len(experts.names)

    def _merged(self, piece: Piece) -> torch.Tensor:
        """Return the merged difference as it is stored."""
        if self.options.merge == "sum":
            found = total(piece.deltas).float()
        else:
            found = ties_merge(piece.deltas, *self.trim.limits(piece), "sum")
        return found.to(self.dtype).float()

    def _mask(self, piece: Piece, merged: torch.Tensor, index: int) -> torch.Tensor:
        lam = self.options.lam
        threshold = lam[piece.experts[index]] if isinstance(lam, dict) else lam
        delta = piece.deltas[index]
        return (delta.abs() > threshold * (merged - delta).abs()) & (merged != 0)


class Consensus(MergePlugin):
    """TALL masks and Consensus merging."""

    name = "consensus"
    Options = ConsensusOptions
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0}

    @classmethod
    def method(cls, options: ConsensusOptions, seed: int) -> ConsensusMethod:
        return ConsensusMethod(options)
