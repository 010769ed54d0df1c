"""What a user may say about DAM."""

from __future__ import annotations

from typing import Literal

from graftwork.transform.scheme import FULL, ActivationScheme, QuantizeOptions
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from graftwork_dam.adhesive import parse_init
from graftwork_dam.forward import Rounding

Order = Literal["lq", "ql", "qlq", "q_of_l"]
Place = Literal["rank", "input", "both"]


class LearnOptions(BaseModel):
    """How the diagonals are learned, layer by layer."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    steps: int = Field(200, ge=0, description="steps of Adam; 0 keeps the best start")
    lr: float = Field(0.02, gt=0, description="its learning rate, on the logarithm of the diagonal")
    tokens: int = Field(4096, ge=1, description="calibration tokens that the loss is taken on")


class DamOptions(QuantizeOptions):
    """Options of dam."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    ratio: float = Field(
        0.9, gt=0, le=1, description="share of each weight's parameters that its factors keep"
    )
    rank: int | None = Field(None, ge=1, description="the same rank for all weights, instead of ratio")
    latent_bits: int = Field(
        FULL, ge=2, le=FULL, description="bits of what flows between the factors; 16: as it is"
    )
    metric: Literal["whiten", "plain"] = Field(
        "whiten",
        description="the best approximation of outputs on the calibration text, or of the weight itself",
    )
    damp: float = Field(
        0.0, ge=0, description="added to the diagonal of the inputs' second moments, as a share of its mean"
    )
    quantizer: Literal["gptq", "rtn", "none"] = Field(
        "gptq",
        description="round with error feedback, or to the nearest; none leaves the factors to a plugin that "
        "rounds, and the diagonal still prepares for the scheme",
    )
    feedback_damp: float = Field(
        0.01, gt=0, description="gptq: added to the diagonal of the second moments, as a share of its mean"
    )
    place: Place = Field(
        "rank", description="where a diagonal is: between the factors, on the inputs, or both"
    )
    init: str = Field(
        "grid",
        description="where the diagonal begins: grid (the best of ten), p0, p05, p1, p<power> (of the singular "
        "values), smoothquant<alpha>",
    )
    learn: LearnOptions = Field(default_factory=lambda: LearnOptions.model_validate({}))
    loss: Literal["layer", "block"] = Field(
        "layer",
        description="what learning makes small: the error of each linear, or of the whole decoder layer",
    )
    order: Order = Field(
        "lq",
        description="low rank, then rounded factors; ql: low rank of the rounded weight, in numbers; qlq: that, "
        "rounded again; q_of_l: the low-rank weight, rounded as one matrix",
    )
    format: Literal["factored", "merged"] = Field(
        "factored",
        description="merged: one dense matrix for any runtime, which keeps the result and loses the size",
    )
    targets: list[str] = Field(
        [], description="patterns of the linears to compress, such as *.mlp.* or *.q_proj; all if empty"
    )

    @field_validator("init")
    @classmethod
    def _readable_init(cls, value: str) -> str:
        parse_init(value)
        return value

    @field_validator("latent_bits")
    @classmethod
    def _latents(cls, value: int) -> int:
        if 8 < value < FULL:
            raise ValueError("latents have 2 to 8 bits, or 16 (as they are)")
        return value

    @model_validator(mode="after")
    def _sensible(self) -> DamOptions:
        rounded = self.latent_bits < FULL
        if rounded and self.place == "input":
            raise ValueError(
                f"latent_bits = {self.latent_bits} needs a diagonal between the factors, and place: input has none; "
                f"take place: rank or both"
            )
        if self.quantizer == "none" and (rounded or self.kv.rounds):
            what = "the latents are" if rounded else "the KV cache is"
            raise ValueError(f"with quantizer: none {what} rounded by the plugin that comes after")
        if rounded and (self.order == "q_of_l" or self.format == "merged"):
            one = "order: q_of_l" if self.order == "q_of_l" else "format: merged"
            raise ValueError(
                f"{one} makes one matrix, which has no latents to round; leave latent_bits at 16"
            )
        if self.place == "input" and parse_init(self.init)[0] == "power":
            raise ValueError(
                f"init: {self.init} splits singular values, and place: input has no diagonal there"
            )
        if self.ratio != 0.9 and self.rank is not None:
            raise ValueError("give ratio or rank, not both")
        if self.order == "q_of_l":
            for field in ("init", "learn", "place", "loss"):
                if field in self.model_fields_set:
                    raise ValueError(f"order: q_of_l makes one matrix without a diagonal; leave out {field}")
        if self.order in ("ql", "q_of_l", "qlq") and self.quantizer == "none":
            raise ValueError(f"order: {self.order} rounds; take quantizer: gptq or rtn")
        if self.loss == "block" and not self.learn.steps:
            raise ValueError("loss: block learns nothing with learn.steps = 0")
        if self.loss == "block" and self.place != "rank":
            raise ValueError("loss: block is there for place: rank only")
        return self

    @property
    def rounding(self) -> Rounding:
        """Return how the factors are rounded, or (``ql``) that they are not."""
        weights = self.weights
        if self.order == "ql":
            weights = weights.model_copy(update={"bits": FULL})
        latents = ActivationScheme(
            bits=self.latent_bits,
            symmetric=self.activation_symmetric,
            convention=self.convention,
            ratio=self.activation_ratio,
        )
        return Rounding(weights, self.activations, latents)
