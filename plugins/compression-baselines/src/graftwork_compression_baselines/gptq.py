"""GPTQ: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023
(arXiv 2210.17323).

Columns of a weight are rounded one after another, and the error of each is spread over those not yet rounded so that
the layer's outputs on calibration tokens change least (:mod:`graftwork.transform.feedback`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from graftwork import WeightTransform, hookimpl

from graftwork_compression_baselines.order import WeightPlugin
from graftwork_compression_baselines.rounding import (
    OUTPUT_ERROR,
    WEIGHT_ERROR,
    FeedbackOptions,
    RoundingOptions,
    round_layer,
)

if TYPE_CHECKING:
    from graftwork.run import Run
    from graftwork.transform.block import Block


class GptqOptions(RoundingOptions, FeedbackOptions):
    """Options of GPTQ."""


class Gptq(WeightPlugin):
    """Rounding with error feedback."""

    name = "gptq"
    Options = GptqOptions
    neutral: ClassVar[dict[str, Any]] = {"scheme": "W16A16"}

    def __init__(self, options: GptqOptions) -> None:
        self.options = options
        self.rounds = options.weights.rounds

    @hookimpl
    def weight_transforms(self, run: Run) -> Sequence[WeightTransform]:
        needs = "activations" if self.rounds else "none"
        figures = WEIGHT_ERROR | OUTPUT_ERROR
        return [WeightTransform("gptq", self.transform, needs=needs, rounds=True, figures=figures)]

    def transform(self, block: Block) -> None:
        """Round one layer."""
        round_layer(block, self.options, "gptq")
