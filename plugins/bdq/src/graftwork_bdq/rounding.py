"""Rounding a folded layer: weights with error feedback or to nearest, with what was learned of their ranges."""

from __future__ import annotations

import torch
from graftwork.transform.block import Block
from graftwork.transform.feedback import output_error, round_with_feedback
from graftwork.transform.quantizer import Quantized, quantize_weight, quantize_with, weight_scales
from graftwork.transform.scheme import ActivationScheme, WeightScheme

from graftwork_bdq.flatness import concentration
from graftwork_bdq.layer import LayerTransform, PlaceTransform

FIGURES = {
    "weight_error": "squared error of the rounded weights relative to their square",
    "output_error": "squared error of a linear's output by its weights, relative to the output's square (gptq)",
    "scale_spread": "standard deviation of ln s at a place",
    "block_loss_before": "learn: block: squared error of the block relative to its output's square, before learning",
    "block_loss_after": "the same after",
    "block_loss_raised": "share of the blocks whose loss learning raised; these took their start again",
}


def clamped(
    weight: torch.Tensor, scheme: WeightScheme, high: torch.Tensor | None, low: torch.Tensor | None
) -> torch.Tensor:
    """Return the weight (out x in) within the shares ``high`` and ``low`` (out x groups) of each range."""
    if high is None or low is None:
        return weight
    grouped = weight.unflatten(1, (high.shape[1], -1))
    largest = grouped.amax(-1, keepdim=True).clamp_min(0) * high.unsqueeze(-1).to(weight.dtype)
    least = grouped.amin(-1, keepdim=True).clamp_max(0) * low.unsqueeze(-1).to(weight.dtype)
    return torch.minimum(torch.maximum(grouped, least), largest).flatten(1)


def nearest(
    weight: torch.Tensor,
    scheme: WeightScheme,
    high: torch.Tensor | None = None,
    low: torch.Tensor | None = None,
    name: str = "",
) -> Quantized:
    """Round to nearest; with shares, scales and zero points are those of the narrowed range.

    What comes out has the values that ``fake_quantize_weight`` has for the same shares.
    """
    if high is None or low is None:
        return quantize_weight(weight, scheme, name)
    plain = scheme.model_copy(update={"clip": "none"})
    scale, zero = weight_scales(clamped(weight, plain, high, low), plain, name)
    return Quantized(quantize_with(weight, scale, zero, plain), scale, zero, plain)


def activation_scheme(place: PlaceTransform) -> ActivationScheme:
    """Return the rounding of the place's inputs, with the share of the range that was learned."""
    ratio = place.ratio()
    if ratio is None:
        return place.scheme
    return place.scheme.model_copy(update={"ratio": place.scheme.ratio * ratio.item()})


@torch.no_grad()
def round_layer(block: Block, layer: LayerTransform) -> None:
    """Round weights and inputs of a folded layer, place by place, so that each sees what those before let through.

    Raises:
        UserError: moments without a factor (gptq), or a weight that is no number.
    """
    options = layer.options
    if options.quantizer == "none":
        return
    feedback = options.quantizer == "gptq" and layer.weights.rounds
    for part in layer.places:
        shared: torch.Tensor | None = None
        for name in layer.linears(part):
            moments = None
            if feedback and layer.reader(name) is None:
                # What stands between the factors of a weight is its own.
                moments = block.second_moments(name)[name]
            elif feedback:
                # All others of a place read the same, rotated by the same matrix.
                shared = block.second_moments(name)[name] if shared is None else shared
                moments = shared
            weight = block.get(name).dense_weight().detach()
            full = f"{block.name}.{name}"
            high, low = layer.kept(name)
            rounded = None
            if moments is not None:
                scheme = layer.weights if high is None else layer.weights.model_copy(update={"clip": "none"})
                rounded = round_with_feedback(
                    clamped(weight, scheme, high, low),
                    moments,
                    scheme,
                    damp=options.damp,
                    order=options.order,
                    name=full,
                )
            elif layer.weights.rounds:
                rounded = nearest(weight, layer.weights, high, low, full)
            if rounded is not None:
                _record(block, name, weight, rounded, moments)
            block.round(name, rounded)
        if options.activations.rounds:
            for name in layer.linears(part):
                reader = layer.reader(name)
                scheme = options.activations if reader is None else activation_scheme(reader)
                block.round(name, None, scheme)


def _record(
    block: Block, name: str, weight: torch.Tensor, rounded: Quantized, moments: torch.Tensor | None
) -> None:
    wrong = weight.double() - rounded.dequantized(torch.float64)
    size = float(weight.double().square().sum())
    found = {
        "concentration": float(concentration(weight)) if size else 0.0,
        "weight_error": float(wrong.square().sum()) / size if size else 0.0,
    }
    if moments is not None:
        output = output_error(weight, moments)
        found["output_error"] = output_error(wrong, moments) / output if output else 0.0
    block.record(name, **found)
