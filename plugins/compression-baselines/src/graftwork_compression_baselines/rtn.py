"""RTN: every weight to its nearest level, and nothing else; the baseline of all rounding methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from graftwork import WeightTransform, hookimpl

from graftwork_compression_baselines.order import WeightPlugin
from graftwork_compression_baselines.rounding import WEIGHT_ERROR, RoundingOptions, round_layer

if TYPE_CHECKING:
    from graftwork.run import Run
    from graftwork.transform.block import Block


class RtnOptions(RoundingOptions):
    """Options of RTN."""


class Rtn(WeightPlugin):
    """Round to nearest."""

    name = "rtn"
    Options = RtnOptions
    neutral: ClassVar[dict[str, Any]] = {"scheme": "W16A16"}

    def __init__(self, options: RtnOptions) -> None:
        self.options = options
        self.rounds = options.weights.rounds

    @hookimpl
    def weight_transforms(self, run: Run) -> Sequence[WeightTransform]:
        return [WeightTransform("rtn", self.transform, needs="none", rounds=True, figures=WEIGHT_ERROR)]

    def transform(self, block: Block) -> None:
        """Round one layer."""
        round_layer(block, self.options)
