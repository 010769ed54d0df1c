"""Hadamard rotations after QuaRot: Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS
2024 (arXiv 2404.00456).

A rotation spreads outliers over all channels. ``residual``: the residual stream is turned once and for all by what
writes and reads it, the values of each head likewise, and only the input of ``down`` at run time. ``online``: the
input of every linear is turned at run time and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from graftwork import WeightTransform, hookimpl
from graftwork.transform.modules import Rotation
from pydantic import BaseModel, ConfigDict, Field

from graftwork_compression_baselines.order import WeightPlugin
from graftwork_compression_baselines.rotating import (
    make_rotation,
    rotate_heads,
    rotate_inputs,
    rotate_outer,
    rotate_residual,
    turned_back,
)
from graftwork_compression_baselines.surroundings import reading

if TYPE_CHECKING:
    from graftwork.run import Run
    from graftwork.transform.block import Block
    from graftwork.transform.outer import Outer


class HadamardOptions(BaseModel):
    """Options of Hadamard rotations."""

    model_config = ConfigDict(extra="forbid")

    place: Literal["residual", "online"] = Field(
        "residual",
        description="residual: fold what can be folded (QuaRot); online: turn the input of every linear at run time",
    )
    block: Literal["auto"] | Annotated[int, Field(ge=2)] = Field(
        "auto",
        description="order of the Hadamard matrices along the diagonal; auto: the largest that divides",
    )


class Hadamard(WeightPlugin):
    """Rotations that spread outliers."""

    name = "hadamard"
    Options = HadamardOptions

    def __init__(self, options: HadamardOptions) -> None:
        self.options = options
        self.clears_norms = options.place == "residual"
        self._residual: Rotation | None = None

    @hookimpl
    def weight_transforms(self, run: Run) -> Sequence[WeightTransform]:
        if self.options.place == "online":
            return [WeightTransform("hadamard", self.online, needs="none", rotates=True)]
        return [
            WeightTransform(
                "hadamard",
                lambda block: self.residual(block, run.seed),
                needs="none",
                rotates=True,
                begin=lambda outer: self.begin(outer, run.seed),
                restore=self.restore,
            )
        ]

    def online(self, block: Block) -> None:
        """Turn the input of every linear of a layer; linears with as many inputs turn them alike."""
        for name, linear in block.linears().items():
            size = linear.weight.shape[1]
            full = f"{block.name}.{name}"
            rotate_inputs(block, name, make_rotation(size, block.seed, self.options.block, full))

    def begin(self, outer: Outer, seed: int) -> None:
        """Turn the residual stream at both ends of the model."""
        size = outer.embedding.weight.shape[1]
        self._residual = make_rotation(size, seed, self.options.block, "the residual stream")
        rotate_outer(outer, self._residual)

    def residual(self, block: Block, seed: int) -> None:
        """Turn the residual stream, the heads and the input of down in one layer."""
        assert self._residual is not None
        places = {place.name: place for place in block.places()}
        rotate_residual(block, self._residual)
        rotate_heads(block)
        for name in places["down"].linears:
            size = block.get(reading(block, name)).weight.shape[1]
            full = f"{block.name}.{name}"
            rotate_inputs(block, name, make_rotation(size, seed + 1, self.options.block, full))

    def restore(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden states in the basis of the unchanged model."""
        assert self._residual is not None
        return turned_back(self._residual, hidden).to(hidden.dtype)
