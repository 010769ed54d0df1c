"""What a recipe may say about PaRSP."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Neurons(BaseModel):
    """Names of an MLP's projections, relative to what they share."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    ins: list[str] = Field(alias="in", min_length=1, description="input projections, such as [gate, up]")
    out: str = Field(description="output projection")


class ParspOptions(BaseModel):
    """Options of PaRSP."""

    model_config = ConfigDict(extra="forbid")

    density: float = Field(0.05, gt=0, le=1, description="share of a layer's neurons in a task's core")
    eps: float = Field(
        0.1, ge=0, lt=1, description="share of the inputs' second-moment energy left unprotected"
    )
    null_space: bool = Field(True, description="false: regions only, no direction is protected")
    h: float = Field(0.9, ge=0, le=1, description="entropy from which on a neuron is a generalist")
    select: Literal["layer", "global"] = Field("layer", description="rank neurons in each layer, or over all")
    rows: Literal["relevant", "random"] = Field(
        "relevant", description="random: a drawn core of equal size, for ablation"
    )
    generalist: Literal["project", "freeze"] = Field(
        "project",
        description="freeze: generalists stay out of the core, and the next specialised neurons take their places",
    )
    form: Literal["full", "lora"] = Field("full", description="lora: Theta = B A of rank 'rank'")
    rank: int = Field(8, ge=1, description="rank of Theta, for form: lora")
    mode: Literal["adapter", "gradient"] = Field(
        "adapter",
        description="gradient: full weights, with gradients projected and weights put back after each step",
    )
    down: Literal["none", "columns"] = Field(
        "none", description="columns: the core's columns of the output projection train too"
    )
    calibration: str | None = Field(
        None,
        description="absolute path of a general text (.txt or .jsonl) that counts as a task before the first",
    )
    calibration_windows: int = Field(256, ge=1, description="windows of 128 tokens read of it")
    relevance_items: int = Field(128, ge=1, description="items of a task that relevance is measured on")
    moment_items: int | None = Field(
        None, ge=1, description="items for second moments; by default enough for 4 d tokens, 128 at least"
    )
    moments: Literal["full", "sketch"] = Field(
        "full", description="sketch: frequent directions instead of d x d"
    )
    sketch: int = Field(512, ge=1, description="rows of a sketch (moments: sketch, down: columns)")
    budget: float = Field(
        1.0, gt=0, le=1, description="share of a layer's neurons that all cores may use together"
    )
    exhausted: Literal["stop", "share"] = Field(
        "stop", description="when the budget is used up: stop, or share neurons of earlier cores"
    )
    state_limit_mib: float | None = Field(
        None, gt=0, description="refuse a stream whose statistics would take more than this"
    )
    neurons: Neurons | None = Field(
        None, description="projections of a model that is not recognised: {in: [gate, up], out: down}"
    )

    @model_validator(mode="after")
    def _fits(self) -> ParspOptions:
        if self.budget < self.density:
            raise ValueError(
                f"budget = {self.budget:g} must be at least density = {self.density:g}, what one task takes"
            )
        sketched = self.moments == "sketch" or self.down == "columns"
        for needed, fields, cure in (
            (self.mode == "adapter", ("form", "down"), "mode: adapter"),
            (self.form == "lora", ("rank",), "form: lora"),
            (self.null_space, ("eps", "moments", "moment_items"), "null_space: true"),
            (self.null_space and sketched, ("sketch",), "moments: sketch or down: columns"),
            (self.calibration is not None, ("calibration_windows",), "a calibration text"),
        ):
            for field in fields if not needed else ():
                if getattr(self, field) != type(self).model_fields[field].default:
                    raise ValueError(f"{field} = {getattr(self, field)} does nothing without {cure}")
        return self

    @property
    def kept_moments(self) -> Literal["full", "sketch"] | None:
        """Return in which form the moments of the MLPs' inputs are kept; None where nothing is protected."""
        return self.moments if self.null_space else None

    @property
    def kept_columns(self) -> bool:
        """Return whether the moments of the activations are kept."""
        return self.null_space and self.down == "columns"

    @property
    def names(self) -> dict[str, object] | None:
        """Return ``neurons`` as :func:`graftwork_parsp.find_mlps` takes it."""
        return None if self.neurons is None else {"in": list(self.neurons.ins), "out": self.neurons.out}
