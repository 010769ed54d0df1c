"""What a recipe may say about COIECD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from graftwork import UserError
from graftwork.validation import first_problem
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from graftwork_coiecd.scores import Coiecd


class CoiecdOptions(BaseModel):
    """Options of COIECD."""

    model_config = ConfigDict(extra="forbid")

    alpha: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="weight of the contrast between the two distributions"
    )
    ratio: float = Field(
        4.0,
        ge=1,
        description="1/lambda: how many times less likely than the likeliest a plausible token may be; inf: all "
        "tokens are, which is CAD",
    )
    constraint: Literal["softmax", "band"] = Field(
        "softmax",
        description="softmax: bounds as in the official code; band: information within gamma of the entropy",
    )
    gamma: float = Field(1.0, ge=0, description="half width of the band in nats, for constraint: band")
    base: Literal["assigned", "swapped"] = Field(
        "assigned",
        description="swapped: violating tokens start from the distribution without context and the others from "
        "that with it; a negative control",
    )

    @model_validator(mode="after")
    def _used(self) -> CoiecdOptions:
        other, needed = ("gamma", "band") if self.constraint == "softmax" else ("ratio", "softmax")
        if getattr(self, other) != type(self).model_fields[other].default:
            raise ValueError(f"{other} = {getattr(self, other)} does nothing without constraint: {needed}")
        return self

    @property
    def method(self) -> Coiecd:
        """Return the functions of this setting."""
        return Coiecd(self.alpha, self.ratio, self.constraint, self.gamma, self.base == "swapped")


def validated(options: Mapping[str, Any]) -> CoiecdOptions:
    """Return validated options.

    Raises:
        UserError: an unknown name, or a value out of bounds.
    """
    try:
        return CoiecdOptions.model_validate(dict(options))
    except ValidationError as error:
        raise UserError(f"COIECD: {first_problem(error, CoiecdOptions)}") from None
