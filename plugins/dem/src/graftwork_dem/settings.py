"""The options of dem."""

from __future__ import annotations

from typing import Literal

from graftwork.edit.plugin import EditOptions
from graftwork.edit.solve import RIDGE
from graftwork.edit.target import StateOptions
from pydantic import ConfigDict, Field, model_validator

from graftwork_dem.options import LocateOptions


def _state() -> StateOptions:
    return StateOptions.model_validate({"variants": 3})


class DemOptions(EditOptions):
    """Options of dem."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    locate: LocateOptions = Field(
        default_factory=lambda: LocateOptions.model_validate({}), description="where a request is written"
    )
    state: StateOptions = Field(
        default_factory=_state,
        description="the target state; of its variants (3 unless set) are its loss and the keys",
    )
    lam: float = Field(
        15000.0, gt=0, description="weight of the second moments against the edits; tune it per model"
    )
    ridge: float = Field(RIDGE, gt=0, description="added to lam C, as a share of the mean of its diagonal")
    average: Literal["mean", "groups"] = Field(
        "mean",
        description="keys: all prompts of a request count alike, or the bare prompt counts one half (as MEMIT does)",
    )
    protect: bool = Field(
        False,
        description="keep what requests that did not choose a site get from it (their keys, residual zero)",
    )

    @model_validator(mode="before")
    @classmethod
    def _with_variants(cls, value: object) -> object:
        """Set the variants of a state that is given in part."""
        if isinstance(value, dict) and isinstance(value.get("state"), dict):
            return {**value, "state": {"variants": 3, **value["state"]}}
        return value
