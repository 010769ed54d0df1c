"""Options of the plugin, and the schedule that they mean for a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from graftwork import UserError
from pydantic import BaseModel, ConfigDict, Field

from graftwork_d3.schedule import EXPECTED_TOKENS, DepthSchedule

Layer = Annotated[int, Field(ge=1)]
DEFAULT_RATIO = 0.9


class D3Options(BaseModel):
    """Options of d3. Without a decay, a budget or a file, the budget is 0.9 of the layers."""

    model_config = ConfigDict(extra="forbid")

    alpha: float | None = Field(
        None, gt=0, le=1, description="decay: floor(layers * alpha^t) layers at step t"
    )
    target_ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="budget instead of alpha: mean share of the layers that a new token goes through",
    )
    expected_tokens: int = Field(
        EXPECTED_TOKENS, ge=1, description="new tokens over which target_ratio is the mean"
    )
    flex_start: int | None = Field(
        None,
        ge=1,
        description="first layer that may be left out, counted from 0; a quarter of all when empty",
    )
    tail: int | None = Field(None, ge=1, description="last layers that always run; 2 when empty")
    minimum: int | None = Field(None, ge=2, description="layers that run at any step; half of all when empty")
    order: Literal["from_start", "from_end", "spread"] | list[Layer] = Field(
        "from_start",
        description="how the layers between leave: from either end, spread out, or layer numbers in order",
    )
    levels: int | None = Field(
        None, ge=2, description="number of different depths, for compilers; any depth when empty"
    )
    config: str | None = Field(None, description="a d3.json that d3:tune wrote, instead of the options above")


def schedule_for(options: D3Options, layers: int) -> DepthSchedule:
    """Return the schedule for a model of ``layers`` layers.

    Raises:
        UserError: options that contradict each other or do not fit the model; a file that is no schedule of it.
    """
    chosen = options.model_fields_set - {"config", "levels"}
    if options.config is not None:
        if chosen:
            raise UserError(
                f"plugins.d3.config brings the whole schedule; remove plugins.d3.{sorted(chosen)[0]}, or the config"
            )
        return read_schedule(Path(options.config), layers, options.levels)
    if options.alpha is not None and options.target_ratio is not None:
        raise UserError(
            f"plugins.d3.alpha = {options.alpha} and target_ratio = {options.target_ratio} both set the depth; "
            f"keep one of them"
        )
    ratio = options.target_ratio
    return DepthSchedule.of(
        layers,
        alpha=options.alpha,
        target_ratio=DEFAULT_RATIO if options.alpha is None and ratio is None else ratio,
        expected_tokens=options.expected_tokens,
        start=options.flex_start,
        tail=options.tail,
        minimum=options.minimum,
        order=options.order,
        levels=options.levels,
    )


def read_schedule(path: Path, layers: int, levels: int | None = None) -> DepthSchedule:
    """Return the schedule of a ``d3.json``; ``levels`` replaces its own.

    Raises:
        UserError: there is no such file, it is not one of these, or it is for another number of layers.
    """
    if not path.is_file():
        raise UserError(f"plugins.d3.config: '{path}' does not exist; d3:tune writes one")
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["schedule"]
        schedule = DepthSchedule.from_json({**values, "levels": levels or values["levels"]})
    except (ValueError, KeyError, TypeError):
        raise UserError(f"plugins.d3.config: '{path}' is not a d3.json as d3:tune writes it") from None
    if schedule.layers != layers:
        raise UserError(
            f"plugins.d3.config: '{path}' is for a model of {schedule.layers} layers, this one has {layers}"
        )
    return schedule
