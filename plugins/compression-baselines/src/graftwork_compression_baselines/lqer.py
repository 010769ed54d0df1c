"""Rounded weights with a low-rank correction of what rounding lost: LQER, L2QER and QERA.

LQER and L2QER: Zhang et al., "LQER: Low-Rank Quantization Error Reconstruction for LLMs", ICML 2024 (arXiv 2402.02446).
QERA: Zhang et al., "QERA: an Analytical Framework for Quantization Error Reconstruction", ICLR 2025 (arXiv 2410.06040).

``y = Qa(x) Q(W)^T + (x B^T) A^T``, ``A B`` the best of its rank for ``E = W - Q(W)``: plainly (``none``), with inputs
scaled by their size (``l2qer``), or for the outputs (``exact``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from graftwork import UserError, WeightTransform, hookimpl
from graftwork.transform.feedback import output_error
from graftwork.transform.lowrank import whitener
from graftwork.transform.quantizer import Quantized, quantize_weight
from graftwork.transform.scheme import WeightScheme
from pydantic import Field, field_validator, model_validator

from graftwork_compression_baselines.order import WeightPlugin
from graftwork_compression_baselines.rotating import turned_back
from graftwork_compression_baselines.rounding import (
    OUTPUT_ERROR,
    WEIGHT_ERROR,
    FeedbackOptions,
    RoundingOptions,
    round_layer,
)
from graftwork_compression_baselines.svd import factors

if TYPE_CHECKING:
    from graftwork.run import Run
    from graftwork.transform.block import Block


class LqerOptions(RoundingOptions, FeedbackOptions):
    """Options of a low-rank correction."""

    scale: Literal["none", "l2qer", "exact"] = Field(
        "exact",
        description="metric of the error: none (LQER), l2qer (inputs scaled by their mean size), exact (outputs; QERA)",
    )
    rank: int = Field(32, ge=1, description="of the correction; the papers use 32 for 4 bits, 256 for 2 bits")
    quantizer: Literal["rtn", "gptq"] = Field("rtn", description="what rounds the weight")
    factor_bits: int = Field(
        16,
        ge=2,
        le=16,
        description="bits that both factors are rounded to, per row; they are stored in the model's dtype all the same",
    )

    @field_validator("factor_bits")
    @classmethod
    def _storable(cls, bits: int) -> int:
        WeightScheme(bits=bits)
        return bits

    @model_validator(mode="after")
    def _rounds(self) -> LqerOptions:
        if not self.weights.rounds:
            raise ValueError(f"scheme: {self.scheme} rounds no weights, so there is nothing to correct")
        return self


def l2qer_scales(sizes: torch.Tensor) -> torch.Tensor:
    """Return the scales of inputs (d, float64) from the largest ``mean_t |X_tj|`` of any batch (d).

    At least 1e-4, divided by the root of the largest times the least.
    """
    sizes = sizes.double().clamp(min=1e-4)
    return sizes / (sizes.max() * sizes.min()).sqrt()


def rounded_factor(factor: torch.Tensor, bits: int) -> torch.Tensor:
    """Return a factor rounded to nearest, one symmetric scale per row."""
    scheme = WeightScheme(bits=bits)
    return quantize_weight(factor, scheme).dequantized() if scheme.rounds else factor


class Lqer(WeightPlugin):
    """Rounding, and what it lost at low rank."""

    name = "lqer"
    Options = LqerOptions

    def __init__(self, options: LqerOptions) -> None:
        self.options = options

    @property
    def wants_moments(self) -> bool:
        return self.options.scale == "exact"

    @hookimpl
    def weight_transforms(self, run: Run) -> Sequence[WeightTransform]:
        figures = WEIGHT_ERROR | OUTPUT_ERROR
        if self.wants_moments:
            figures |= {"corrected_error": "output_error with the correction"}
        needs = "none" if self.options.scale == "none" and self.options.quantizer == "rtn" else "activations"
        return [WeightTransform("lqer", self.transform, needs=needs, rounds=True, figures=figures)]

    def transform(self, block: Block) -> None:
        """Round one layer and correct it."""
        options = self.options

        def correct(name: str, weight: torch.Tensor, rounded: Quantized, seen: torch.Tensor | None) -> None:
            full = f"{block.name}.{name}"
            if options.rank > min(weight.shape):
                rows, columns = weight.shape
                raise UserError(
                    f"plugins.lqer.rank = {options.rank} is more than '{full}' ({rows} x {columns}) has; use "
                    f"{min(rows, columns)} at most"
                )
            wrong = weight.double() - rounded.dequantized().double()
            left, right = factors(wrong, options.rank, self._metric(block, name, seen), full)
            if self.wants_moments and seen is not None:
                square = max(output_error(weight, seen), 1e-300)
                block.record(name, corrected_error=output_error(wrong - left @ right, seen) / square)
            rotation = block.get(name).rotation
            if rotation is not None:
                # The correction sees the input before it is rotated.
                right = turned_back(rotation, right)
            left, right = (rounded_factor(one.to(weight.dtype), options.factor_bits) for one in (left, right))
            block.get(name).corrected((left, right))

        round_layer(block, options, options.quantizer, correct=correct, wants_moments=self.wants_moments)

    def _metric(self, block: Block, name: str, seen: torch.Tensor | None) -> torch.Tensor | None:
        if self.options.scale == "none":
            return None
        if self.options.scale == "exact":
            assert seen is not None
            return whitener(seen, name=f"{block.name}.{name}")
        largest = torch.stack(
            [inputs[name].float().abs().mean(0) for inputs in block.inputs(name, share=True)]
        ).amax(0)
        return l2qer_scales(block.reduced(largest, torch.maximum))
