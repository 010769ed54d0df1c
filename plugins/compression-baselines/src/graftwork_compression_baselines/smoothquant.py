"""SmoothQuant: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
ICML 2023 (arXiv 2211.10438).

Large input channels are divided by a scale and the weight's columns multiplied by it, so that both are easy to round:
``s_j = max |X_j|^alpha / max |W_j|^(1 - alpha)``. What made the input (a norm, or the rows of a linear) is divided, so
nothing is computed at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from graftwork import WeightTransform, hookimpl
from pydantic import BaseModel, ConfigDict, Field

from graftwork_compression_baselines.order import WeightPlugin, touches_rotated
from graftwork_compression_baselines.surroundings import fold_scales, inputs_of

if TYPE_CHECKING:
    from graftwork.run import Run
    from graftwork.transform.block import Block
    from graftwork.transform.structure import Place

PlaceName = Literal["qkv", "o", "gate_up", "down"]
FLOOR = 1e-5
"""Least scale, and least weight that counts (the paper's code)."""


class SmoothQuantOptions(BaseModel):
    """Options of SmoothQuant."""

    model_config = ConfigDict(extra="forbid")

    alpha: float = Field(
        0.5, ge=0, le=1, description="how much of the difficulty goes from inputs to weights"
    )
    measure: Literal["largest", "range"] = Field(
        "largest",
        description="size of an input channel: its largest absolute value (the paper), or largest minus least, against "
        "twice the largest weight (llm-compressor)",
    )
    places: list[PlaceName] = Field(
        ["qkv", "gate_up"],
        min_length=1,
        description="whose inputs are scaled; qkv and gate_up fold into norms, o into v_proj, down into up_proj",
    )


def smooth_scales(inputs: torch.Tensor, weights: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return ``inputs^alpha / weights^(1 - alpha)`` (d, float64), at least 1e-5.

    ``inputs`` (d) and ``weights`` (d) are the sizes of each channel in the activations and in the weights' columns.
    """
    weights = weights.double().clamp(min=FLOOR)
    return (inputs.double().pow(alpha) / weights.pow(1 - alpha)).clamp(min=FLOOR)


def pooled(place: Place, values: torch.Tensor) -> torch.Tensor:
    """Return values per input of a place (d) as the largest of those that one channel of its source feeds (n)."""
    if place.repeats == 1:
        return values
    return values.unflatten(-1, (-1, place.repeats, place.head_dim)).amax(-2).flatten(-2)


class SmoothQuant(WeightPlugin):
    """Scales that move outliers from inputs to weights."""

    name = "smoothquant"
    rescales = True
    Options = SmoothQuantOptions

    def __init__(self, options: SmoothQuantOptions) -> None:
        self.options = options

    @hookimpl
    def weight_transforms(self, run: Run) -> Sequence[WeightTransform]:
        figures = {"largest_scale": "largest scale of a place"}
        return [
            WeightTransform(
                "smoothquant", self.transform, scales=touches_rotated(self.options.places), figures=figures
            )
        ]

    def transform(self, block: Block) -> None:
        """Scale the inputs of one layer's linears."""
        places = [place for place in block.places() if place.name in self.options.places]
        # Of all places before any is changed: scales leave their inputs as large as they were elsewhere.
        scales = {place.name: self.scales(block, place) for place in places}
        for place in places:
            fold_scales(block, place, scales[place.name], self.name)
            block.record(place.linears[0], largest_scale=float(scales[place.name].max()))

    def scales(self, block: Block, place: Place) -> torch.Tensor:
        """Return the scales of a place, per output channel of its source."""
        linears = [inputs_of(block, name, self.name) for name in place.linears]
        weights = torch.cat([linear.weight.detach().double() for linear in linears]).abs().amax(0)
        first = f"{place.linears[0]}.0" if linears[0] is not block.get(place.linears[0]) else place.linears[0]
        most, least = block.maxima(first)[first], block.minima(first)[first]
        if self.options.measure == "range":
            inputs, weights = most - least, 2 * weights
        else:
            inputs = torch.maximum(most, -least)
        return smooth_scales(pooled(place, inputs), pooled(place, weights), self.options.alpha)
