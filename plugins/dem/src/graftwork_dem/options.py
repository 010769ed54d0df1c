"""What a user may say about places: how they are found, and how many are taken."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from graftwork_dem.select import parse_place

Mode = Literal["attribution", "trace", "recall", "fixed", "random", "other"]


class LocateOptions(BaseModel):
    """How the places of a request are found and chosen."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    mode: Mode = Field(
        "attribution",
        description="how sites are scored: attribution (a gradient), trace (causal tracing), recall (direct logit "
        "contributions), fixed (the list in sites), random, or other (the sites of another request: a control)",
    )
    sites: list[str] = Field([], description="mode fixed: sites such as mlp.3 or attn.7")
    noise: float = Field(
        3.0, ge=0, description="noise on the event's embeddings, in standard deviations of embedding entries"
    )
    draws: int = Field(10, ge=1, description="draws of the noise")
    window: int = Field(3, ge=1, description="mode trace: layers that are restored together")
    stride: int = Field(
        1,
        ge=1,
        description="mode trace: every how many layers a window is centred; others take the nearest score",
    )
    restore: Literal["last", "event"] = Field(
        "last", description="mode trace: restore the last event token, or all of them"
    )
    locate_variants: int = Field(
        3, ge=0, description="variants (other names) that scores are averaged over beside the request itself"
    )
    scope: Literal["edit", "batch"] = Field(
        "edit", description="sites for every request by itself, or one choice by the mean scores of the batch"
    )
    n_sites: int = Field(6, ge=1, description="sites of an edit")
    min_attn: int = Field(
        1, ge=0, description="attention projections among them, where they have positive scores"
    )
    min_mlp: int = Field(1, ge=0, description="MLP projections among them, where they have positive scores")
    kinds: list[Literal["attn", "mlp"]] = Field(
        ["attn", "mlp"], min_length=1, description="kinds of sites that may be chosen"
    )
    l_min: int = Field(0, ge=0, description="shallowest layer that may be chosen, from 0")
    l_max: int | None = Field(
        None, ge=0, description="deepest layer that may be chosen, from 0; 0.6 of all where not given"
    )
    weights: Literal["scores", "uniform"] = Field(
        "scores", description="how the residual is shared among the sites: by their scores, or evenly"
    )

    @field_validator("sites")
    @classmethod
    def _places(cls, value: list[str]) -> list[str]:
        if len({parse_place(one) for one in value}) < len(value):
            raise ValueError("a site is listed twice")
        return value

    @model_validator(mode="after")
    def _sensible(self) -> LocateOptions:
        if (self.mode == "fixed") != bool(self.sites):
            raise ValueError(
                "mode: fixed needs its sites, such as sites: [mlp.3, attn.4]"
                if self.mode == "fixed"
                else f"sites are for mode: fixed, and the mode is {self.mode}"
            )
        if self.l_max is not None and self.l_max < self.l_min:
            raise ValueError(f"l_max = {self.l_max} is below l_min = {self.l_min}, so no layer may be chosen")
        least = {"attn": self.min_attn, "mlp": self.min_mlp}
        wanted = sum(least[kind] for kind in set(self.kinds))
        if self.mode != "fixed" and wanted > self.n_sites:
            raise ValueError(
                f"min_attn and min_mlp ask for {wanted} sites, and n_sites allows {self.n_sites}"
            )
        if self.mode in ("attribution", "trace", "other") and self.noise == 0:
            raise ValueError("noise: 0 changes nothing, so no site gives anything back; take 3")
        return self
