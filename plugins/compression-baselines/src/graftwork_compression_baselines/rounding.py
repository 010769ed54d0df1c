"""Rounding of all linears of a layer, to nearest or with error feedback; what the rounding plugins share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from graftwork.transform.feedback import output_error, round_with_feedback
from graftwork.transform.quantizer import Quantized, quantize_weight
from graftwork.transform.scheme import KVScheme, QuantizeOptions, check_group
from pydantic import BaseModel, ConfigDict, Field, model_validator

from graftwork_compression_baselines.surroundings import moments, readers

if TYPE_CHECKING:
    from graftwork.transform.block import Block

Correct = Callable[[str, torch.Tensor, Quantized, torch.Tensor | None], None]
"""Told of every rounded linear: its name, its weight before, the rounded one, second moments of its inputs."""

WEIGHT_ERROR = {"weight_error": "squared error of the rounded weights relative to their squares"}
OUTPUT_ERROR = {"output_error": "squared error of the rounded linears' outputs relative to their squares"}


class RoundingOptions(QuantizeOptions):
    """How numbers are rounded."""

    rotate_keys: bool = Field(
        False, description="turn queries and keys by a Hadamard matrix per head before keys are rounded"
    )

    @model_validator(mode="after")
    def _keys_are_rounded(self) -> RoundingOptions:
        if self.rotate_keys and not self.kv.rounds:
            raise ValueError(f"rotate_keys: {self.scheme} does not round keys; add KV4, or leave it out")
        return self

    @property
    def cache(self) -> KVScheme:
        """The scheme of the KV cache."""
        return self.kv.model_copy(update={"rotate_keys": self.rotate_keys})


class FeedbackOptions(BaseModel):
    """How errors are fed back (GPTQ)."""

    model_config = ConfigDict(extra="forbid")

    damp: float = Field(
        0.01, ge=0, description="share of the mean of the moments' diagonal that is added to it"
    )
    order: Literal["given", "importance"] = Field(
        "given", description="in which columns are rounded; importance: largest inputs first (act-order)"
    )
    sequential: bool = Field(
        True,
        description="take the inputs of o after q, k, v were rounded, and so on; false takes all at once, in one pass",
    )
    on_singular: Literal["raise", "nearest"] = Field(
        "raise",
        description="where second moments have no Cholesky factor: refuse, or round to nearest and say so",
    )


def round_layer(
    block: Block,
    options: RoundingOptions,
    quantizer: Literal["rtn", "gptq"] = "rtn",
    *,
    correct: Correct | None = None,
    wants_moments: bool = False,
    change: Callable[[str, torch.Tensor, torch.Tensor | None], torch.Tensor] | None = None,
) -> None:
    """Round weights, inputs and KV cache of a layer as ``options`` say.

    Args:
        block: the layer.
        options: bits, groups, levels.
        quantizer: to nearest, or with error feedback as the options, then :class:`FeedbackOptions`, too, say.
        correct: called with every rounded linear.
        wants_moments: whether ``correct`` and ``change`` look at second moments.
        change: from name, weight and moments to the weight to be rounded.

    Raises:
        UserError: see :func:`graftwork.transform.quantizer.quantize_weight` and
            :func:`graftwork.transform.feedback.round_with_feedback`.
    """
    linears = block.linears()
    scheme = options.weights
    for name, linear in linears.items():
        check_group(scheme, linear.weight.shape[1], f"{block.name}.{name}")
    feedback = options if isinstance(options, FeedbackOptions) else None
    counts = scheme.rounds and (quantizer == "gptq" or wants_moments)
    groups = readers(block, list(linears)) if counts else [list(linears)]
    sequential = feedback is None or feedback.sequential
    found: dict[str, torch.Tensor] = {}
    if counts and not sequential:
        found = _all_moments(block, groups)
    for group in groups:
        if counts and sequential:
            found = moments(block, group)
        if scheme.rounds:
            for name in group:
                weight = block.get(name).weight.detach()
                seen = found.pop(name, None)
                changed = change(name, weight, seen) if change else weight
                rounded = _rounded(block, name, changed, options, seen if quantizer == "gptq" else None)
                _record(block, name, weight, rounded, seen)
                block.round(name, rounded)
                if correct is not None:
                    correct(name, weight, rounded, seen)
        if options.activations.rounds:
            for name in group:
                block.round(name, None, options.activations)
    block.set_kv(options.cache)


def _rounded(
    block: Block,
    name: str,
    weight: torch.Tensor,
    options: RoundingOptions,
    seen: torch.Tensor | None,
) -> Quantized:
    """Round to nearest, or, given second moments, with error feedback."""
    full = f"{block.name}.{name}"
    if seen is None:
        return quantize_weight(weight, options.weights, full)
    assert isinstance(options, FeedbackOptions)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rounded = round_with_feedback(
            weight,
            seen,
            options.weights,
            damp=options.damp,
            order=options.order,
            singular=options.on_singular,
            name=full,
        )
    for one in told:
        block.note(str(one.message))
    return rounded


def _record(
    block: Block, name: str, weight: torch.Tensor, rounded: Quantized, seen: torch.Tensor | None
) -> None:
    wrong = weight.double() - rounded.dequantized().double()
    square = float(weight.double().square().sum())
    block.record(name, weight_error=float(wrong.square().sum()) / max(square, 1e-300))
    if seen is not None:
        square = output_error(weight, seen)
        block.record(name, output_error=output_error(wrong, seen) / max(square, 1e-300))


def _all_moments(block: Block, groups: list[list[str]]) -> dict[str, torch.Tensor]:
    """Return the moments of all groups, in one pass over the tokens where nothing rotates."""
    flat = [name for group in groups for name in group]
    if all(getattr(block.get(name), "rotation", None) is None for name in flat):
        return block.second_moments(flat)
    found: dict[str, torch.Tensor] = {}
    for group in groups:
        found |= moments(block, group)
    return found
