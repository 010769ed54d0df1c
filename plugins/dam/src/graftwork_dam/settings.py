"""The settings of the additivity experiment: ratios, bits, and in which order and with which diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from graftwork.transform.scheme import FULL
from pydantic import BaseModel, ConfigDict, Field, model_validator

from graftwork_dam.options import LearnOptions

Bits = Literal[2, 3, 4, 6, 8]
Composition = Literal["q_of_l", "ql", "qlq", "p0", "p05", "p1", "grid", "learned"]

COMPOSITIONS: dict[Composition, str] = {
    "q_of_l": "low rank, then rounded as one matrix",
    "ql": "low rank of the rounded weight, factors in numbers",
    "qlq": "low rank of the rounded weight, factors split S^1/2 and rounded again",
    "p0": "low rank, factors (U, S V) rounded",
    "p05": "low rank, factors split S^1/2 (SVD-LLM) and rounded",
    "p1": "low rank, factors (U S, V) rounded",
    "grid": "low rank, the best of ten diagonals, rounded",
    "learned": "DAM: low rank, learned diagonal, rounded",
}
SPLITS: tuple[Composition, ...] = ("p0", "p05", "p1", "grid", "learned")
"""Those with latents, which can be rounded."""
LATENTS = (4, 8)
"""Bits of latents whose settings are metrics of their own."""


class AdditivityOptions(BaseModel):
    """Options of ``dam:additivity``."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    calibration: str = Field(
        description="text or JSONL file whose windows show the inputs of the layers; or random"
    )
    samples: int = Field(16, ge=1, description="calibration windows, drawn with the seed")
    window: int = Field(256, ge=2, description="tokens per window, of both texts")
    evaluation: str = Field(description="text whose likelihood is compared; or random")
    evaluation_windows: int = Field(12, ge=1, description="its first so many windows")
    overlap: Literal["refuse", "allow"] = Field(
        "refuse", description="what to do where both texts share more than 1 % of their 13-grams"
    )
    batch_size: int = Field(4, ge=1, description="windows that go through a layer together")
    ratios: list[float] = Field(
        [0.9], min_length=1, description="kept shares of parameters; metrics are of the first"
    )
    bits: list[Bits] = Field([8, 4], min_length=1, description="bits of weights")
    latents: list[int] = Field([FULL], min_length=1, description="bits of latents; 16: as they are")
    activation_bits: int = Field(FULL, ge=2, le=FULL, description="bits of the linears' inputs")
    compositions: list[Composition] = Field([*COMPOSITIONS], min_length=1, description="what is compared")
    quantizer: Literal["rtn", "gptq"] = Field("rtn", description="to the nearest, or with error feedback")
    metric: Literal["whiten", "plain"] = Field("whiten", description="of the low-rank approximation")
    damp: float = Field(
        0.01, ge=0, description="added to the second moments, as a share of their mean diagonal"
    )
    learn: LearnOptions = Field(default_factory=lambda: LearnOptions.model_validate({}))

    @model_validator(mode="after")
    def _fits(self) -> AdditivityOptions:
        if any(not 0 < ratio <= 1 for ratio in self.ratios):
            raise ValueError(f"ratios = {self.ratios}: each lies above 0 and is at most 1")
        if any(bits not in (FULL, *LATENTS) for bits in self.latents):
            raise ValueError(f"latents = {self.latents}: 16 (as they are), 8 or 4")
        return self


@dataclass(frozen=True)
class Setting:
    """One compressed model of the experiment.

    ``kind``: ``l`` (low rank alone), ``q`` (rounding alone), or a composition. What does not apply is None.
    """

    kind: str
    ratio: float | None = None
    bits: int | None = None
    latents: int = FULL

    @property
    def suffix(self) -> str:
        """Return what metrics of this setting end with."""
        weights = "" if self.bits is None else f"_w{self.bits}"
        return weights + ("" if self.latents == FULL else f"l{self.latents}")

    @property
    def words(self) -> str:
        parts = [] if self.ratio is None else [f"ratio {self.ratio:g}"]
        parts += [] if self.bits is None else [f"W{self.bits}"]
        parts += [] if self.latents == FULL else [f"latents {self.latents}"]
        return f"{self.kind} ({', '.join(parts)})"


def settings(options: AdditivityOptions) -> list[Setting]:
    """Return all settings, those that others are compared with first."""
    found = [Setting("l", ratio) for ratio in options.ratios]
    found += [Setting("q", None, bits) for bits in options.bits]
    for ratio in options.ratios:
        for bits in options.bits:
            for latents in options.latents:
                kinds = (
                    options.compositions
                    if latents == FULL
                    else [kind for kind in options.compositions if kind in SPLITS]
                )
                found += [Setting(kind, ratio, bits, latents) for kind in kinds]
    return found


def metric_words(options: AdditivityOptions | None = None) -> dict[str, str]:
    """Return every metric that the experiment has with ``options`` (may have, where None), in words."""
    every: Sequence[int] = get_args(Bits) if options is None else options.bits
    kinds = COMPOSITIONS if options is None else {kind: COMPOSITIONS[kind] for kind in options.compositions}
    latents = LATENTS if options is None else [bits for bits in options.latents if bits != FULL]
    plain = options is None or FULL in options.latents
    words = {
        "dense_nll": "of the unchanged model, nats per token",
        "delta_l": "low rank alone: nats per token lost",
    }
    for bits in every:
        words[f"delta_q_w{bits}"] = f"rounding to {bits} bits alone: nats per token lost"
        if plain:
            words[f"delta_sum_w{bits}"] = f"low rank alone and {bits} bits alone, losses added"
        for kind, what in kinds.items() if plain else ():
            words[f"delta_{kind}_w{bits}"] = f"{what}, {bits} bits: nats per token lost"
            words[f"gap_{kind}_w{bits}"] = f"{what}, {bits} bits: nats beyond the sum of both alone"
            for level, of in (("tensor", "weight"), ("dot", "output")):
                words[f"{level}_gap_{kind}_w{bits}"] = (
                    f"{what}, {bits} bits: {of} error beyond the sum, relative"
                )
                words[f"{level}_ratio_{kind}_w{bits}"] = (
                    f"{what}, {bits} bits: squared {of} error over the sum of both squared errors; 1 if orthogonal"
                )
        for rounded in latents:
            for kind in (kind for kind in SPLITS if kind in kinds):
                name = f"delta_{kind}_w{bits}l{rounded}"
                words[name] = f"{COMPOSITIONS[kind]}, {bits} bits, latents {rounded}: nats per token lost"
    return words
