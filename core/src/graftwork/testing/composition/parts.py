"""In which commands a plugin takes part, and with which options it can be tried on a tiny model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from graftwork.card import hooks_of
from graftwork.plugins import find, load_class
from graftwork.testing.smoke import smoke_recipes
from graftwork.train.sharding import TRAINING

Stage = Literal["train", "transform", "generate"]
STAGES: dict[Stage, frozenset[str]] = {
    "train": frozenset(TRAINING),
    "transform": frozenset({"weight_transforms"}),
    "generate": frozenset({"logits_processors", "generation_context", "combiner", "before_forward"}),
}
"""The commands in the order in which a model goes through them, and the hooks by which a plugin takes part."""


def stages_of(name: str) -> list[Stage]:
    """Return the commands in which a plugin takes part; none where it only measures or reads data."""
    hooks = set(hooks_of(load_class(name)))
    return [stage for stage, mine in STAGES.items() if hooks & mine]


def tiny_options(name: str) -> dict[str, Any]:
    """Return options for a tiny model: those of the first smoke recipe of the plugin's own that uses it, with its
    class attribute ``tiny`` on top.

    Options that name what an earlier step of the recipe makes are left out.
    """
    return {**_from_recipes(name), **getattr(load_class(name), "tiny", {})}


def neutral_options(name: str) -> dict[str, Any] | None:
    """Return the options at which a plugin says that it changes nothing (class attribute ``neutral``); None without."""
    neutral = getattr(load_class(name), "neutral", None)
    return None if neutral is None else {**tiny_options(name), **neutral}


def _from_recipes(name: str) -> dict[str, Any]:
    for _, recipe in smoke_recipes(find(name)):
        for spec in recipe.jobs:
            if name in spec.job.plugins:
                return _without_steps(spec.job.plugins[name])
    return {}


def _without_steps(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in options.items()
        if not (isinstance(value, str) and value.startswith("step:"))
    }
