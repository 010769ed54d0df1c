"""AWQ: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", MLSys 2024
(arXiv 2306.00978).

Channels with large inputs are scaled up in the weight before it is rounded, and down in what makes the input. The
scales are ``x_j^r / w_j^(1-r)``, with the exponent r whose rounded weights change the parent module's output least.
Then ranges are clipped by a search, and weights rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from graftwork import WeightTransform, hookimpl
from pydantic import Field, model_validator

from graftwork_compression_baselines.awq_search import (
    RATIOS,
    candidate,
    channel_weights,
    clipped,
    losses_by_moments,
    losses_by_output,
)
from graftwork_compression_baselines.order import WeightPlugin, touches_rotated
from graftwork_compression_baselines.rounding import (
    OUTPUT_ERROR,
    WEIGHT_ERROR,
    FeedbackOptions,
    RoundingOptions,
    round_layer,
)
from graftwork_compression_baselines.smoothquant import PlaceName
from graftwork_compression_baselines.surroundings import fold_scales, inputs_of, reading

if TYPE_CHECKING:
    from graftwork.run import Run
    from graftwork.transform.block import Block
    from graftwork.transform.structure import Place

PARENTS = {"qkv": "self_attn", "gate_up": "mlp"}
"""Places of several linears, and the module whose output is compared; elsewhere it is the linear's own."""


class AwqOptions(RoundingOptions, FeedbackOptions):
    """Options of AWQ."""

    quantizer: Literal["rtn", "gptq", "none"] = Field(
        "rtn",
        description="what rounds after the scales; none: another plugin does, by the scheme that is given here, too",
    )
    duo: bool = Field(
        True,
        description="divide by the weights' size to the power 1 - r, too; false: inputs only, as in the paper",
    )
    search_clip: bool = Field(
        True, description="clip ranges by their effect on outputs (not of queries and keys); with rtn only"
    )
    places: list[PlaceName] = Field(
        ["qkv", "o", "gate_up", "down"],
        min_length=1,
        description="whose inputs are scaled; qkv and gate_up fold into norms, o into v_proj, down into up_proj",
    )
    search_batches: int | None = Field(
        None,
        ge=1,
        description="calibration batches that the search looks at in q/k/v and gate/up; all if not set",
    )

    @model_validator(mode="after")
    def _rounds(self) -> AwqOptions:
        if not self.weights.rounds:
            raise ValueError(f"scheme: {self.scheme} rounds no weights, so there are no scales to look for")
        if self.quantizer == "none" and (self.activations.rounds or self.cache.rounds):
            raise ValueError(
                "quantizer: none leaves rounding to another plugin; give it the bits of activations and KV cache"
            )
        return self


class Awq(WeightPlugin):
    """Scales that protect the weights of large inputs."""

    name = "awq"
    rescales = True
    Options = AwqOptions

    def __init__(self, options: AwqOptions) -> None:
        self.options = options
        self.rounds = options.quantizer != "none"

    @hookimpl
    def weight_transforms(self, run: Run) -> Sequence[WeightTransform]:
        figures = {
            "awq_exponent": "of the inputs, chosen",
            "awq_loss": "with it, relative to no scales",
        }
        if self.rounds:
            figures |= WEIGHT_ERROR | OUTPUT_ERROR
        return [
            WeightTransform(
                "awq",
                self.transform,
                scales=touches_rotated(self.options.places),
                rounds=self.rounds,
                figures=figures,
            )
        ]

    def transform(self, block: Block) -> None:
        """Scale, clip and round one layer."""
        options = self.options
        for place in block.places():
            if place.name in options.places:
                fold_scales(block, place, self.search(block, place), self.name)
        if options.quantizer == "none":
            return
        clips = options.search_clip and options.quantizer == "rtn"

        def clip(name: str, weight: torch.Tensor, moments: torch.Tensor | None) -> torch.Tensor:
            part = name.rpartition("self_attn.")[2]
            if moments is None or not clips or part.startswith(("q_", "k_")):
                return weight
            return clipped(weight, moments, options.weights)

        round_layer(block, options, options.quantizer, change=clip, wants_moments=clips)

    def search(self, block: Block, place: Place) -> torch.Tensor:
        """Return the best scales of a place, per output channel of its source."""
        options = self.options
        linears: dict[str, Any] = {name: inputs_of(block, name, self.name) for name in place.linears}
        scheme = options.weights
        first = reading(block, place.linears[0])
        weights = [linear.weight for linear in linears.values()]
        x = place.gathered(block.mean_abs(first)[first])
        w = place.gathered(channel_weights(weights, scheme.group)) if options.duo else None
        ratios = [step / RATIOS for step in range(RATIOS)]
        scales = [candidate(x, w, ratio) for ratio in ratios]
        # The last candidate is no scales at all, to compare with.
        tried = [place.spread(one) for one in (*scales, torch.ones_like(scales[0]))]
        if place.name in PARENTS:
            parameters = {name: linear.weight for name, linear in linears.items()}
            parent = PARENTS[place.name]
            losses = losses_by_output(block, parent, parameters, tried, scheme, options.search_batches)
        else:
            losses = losses_by_moments(weights[0], block.second_moments(first)[first], tried, scheme)
        best = min(range(RATIOS), key=losses.__getitem__)
        block.record(
            place.linears[0], awq_exponent=ratios[best], awq_loss=losses[best] / max(losses[-1], 1e-300)
        )
        return scales[best]
