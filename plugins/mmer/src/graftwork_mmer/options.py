"""Options of MMER."""

from __future__ import annotations

from typing import Literal

from graftwork.merge.plugin import ExpandOptions
from pydantic import Field, field_validator, model_validator

from graftwork_mmer.rules import Rule, Scale


class MmerOptions(ExpandOptions):
    """How experts are merged, and which bits each keeps of the merge."""

    keep: float = Field(
        0.2,
        gt=0,
        le=1,
        description="share of every expert's entries that takes part in the merge, the largest",
    )
    trim_scope: Literal["model", "tensor"] = Field(
        "model", description="the largest over the whole model, or in every tensor by itself"
    )
    aggregate: Literal["mean", "sum", "max"] = Field(
        "mean", description="what becomes of the entries that have the elected sign"
    )
    alpha: float = Field(1.0, gt=0, description="scale of the merged difference")
    rule: Rule = Field(
        "l1", description="l1: |tau| > lam |u - tau|; congruence: same sign and |tau| > lam |u|"
    )
    lam: float | dict[str, float] = Field(
        0.6, description="threshold of the masks, for all or per expert; larger ones keep less"
    )
    scale: Scale = Field(
        "none", description="a number per expert that its part of the merge is multiplied by"
    )
    store: Literal["model", "float32"] = Field(
        "model", description="precision of the stored merged difference: the model's, or float32"
    )
    allow_merged: bool = Field(
        False, description="take experts that a merge has written; every such round loses more of them"
    )
    artefact: str | None = Field(
        None,
        description="run that has stored masks: write the model of expert 'expand' from them, without any expert",
    )

    @field_validator("lam")
    @classmethod
    def _positive(cls, value: float | dict[str, float]) -> float | dict[str, float]:
        if any(one <= 0 for one in (value.values() if isinstance(value, dict) else (value,))):
            raise ValueError("is above 0")
        return value

    @model_validator(mode="after")
    def _whose(self) -> MmerOptions:
        if self.artefact is not None and self.expand is None:
            raise ValueError("'artefact' holds many models; say with 'expand' which expert's is wanted")
        return self
