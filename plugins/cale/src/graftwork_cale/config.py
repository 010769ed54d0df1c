"""``cale.json``: what was chosen for a model, and the curves it was chosen from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graftwork import UserError
from graftwork.generate.passes import inner_model
from graftwork.validation import first_problem
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from graftwork_cale.choose import Criterion
from graftwork_cale.enhance import Variant
from graftwork_cale.layers import layers_of, model_id
from graftwork_cale.positions import Where


class CaleConfig(BaseModel):
    """A choice for one model. ``off``: no setting did better than the model as it is."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str = Field(description="hub id or folder name of the model that was measured")
    layers: int = Field(ge=1, description="its decoder layers")
    variant: Variant
    layer: int | None = Field(ge=1, description="chosen layer, counted from 1")
    strength: float = Field(gt=0, description="chosen strength; 1 is off")
    positions: Where
    criterion: Criterion
    off: bool
    curves: dict[str, list[float]] = Field(description="means over items, entry l - 1 for layer l")
    scores: list[tuple[int | None, float, float]] = Field(description="(layer, strength, mean F1) tried")
    data: str = Field(description="SHA-256 of the prompts and answers that were measured")
    items: int = Field(ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> CaleConfig:
        if self.off != (self.strength == 1):
            raise ValueError(f"off is {self.off} and strength {self.strength:g}; off means strength 1")
        if self.layer is None and not self.off:
            raise ValueError("a strength needs a layer")
        return self

    def check_model(self, model: Any, path: str) -> None:
        """Refuse to be used with another model than the one that was measured.

        Raises:
            UserError: naming both.
        """
        name, count = model_id(model), len(layers_of(inner_model(model)))
        if (name, count) != (self.model, self.layers):
            raise UserError(
                f"'{path}' was measured on '{self.model}' with {self.layers} layers, and this model is '{name}' with "
                f"{count}; measure it with `trainer evaluate --benchmark cale:layers`"
            )


def read_config(path: str) -> CaleConfig:
    """Return the choice in a ``cale.json``.

    Raises:
        UserError: no such file, not JSON, or not what this package writes.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"CaLE's config '{path}' cannot be read: {error.strerror}; `trainer evaluate --benchmark cale:layers` "
            f"writes one"
        ) from None
    except ValueError as error:
        raise UserError(f"CaLE's config '{path}' is not JSON: {error}") from None
    try:
        return CaleConfig.model_validate(content)
    except ValidationError as error:
        raise UserError(f"CaLE's config '{path}': {first_problem(error, CaleConfig)}") from None
