"""Which layers of a model are changed while text is generated, and by whom.

A plugin that changes what a decoder layer does (a hook on it, another ``forward``) says so here for as long as
it does. Two that touch the same layer are refused unless both compose: unless each is right whatever the other
makes of the layer. A patch after which a layer may not run at all composes with nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from graftwork.errors import UserError
from graftwork.generate.passes import inner_model


@dataclass(frozen=True)
class LayerPatch:
    """``owner`` does ``effect`` (words such as "leaves out") to ``layers``, counted from 0 at the embedding."""

    owner: str
    effect: str
    layers: frozenset[int]
    composes: bool


_ACTIVE: WeakKeyDictionary[Any, list[LayerPatch]] = WeakKeyDictionary()


@contextlib.contextmanager
def touching_layers(
    model: Any, owner: str, effect: str, layers: Iterable[int], *, composes: bool = False
) -> Iterator[LayerPatch]:
    """Register that ``owner`` changes ``layers`` of ``model`` for as long as the context is open.

    Raises:
        UserError: another patch touches one of the layers, and one of the two does not compose.
    """
    patch = LayerPatch(owner, effect, frozenset(layers), composes)
    active = _ACTIVE.setdefault(inner_model(model), [])
    for other in active:
        shared = other.layers & patch.layers
        if shared and not (composes and other.composes):
            raise UserError(
                f"'{other.owner}' {other.effect} {named(other.layers)} and '{owner}' {effect} "
                f"{named(patch.layers)}: both touch layer {min(shared)}; choose other layers for one of them"
            )
    active.append(patch)
    try:
        yield patch
    finally:
        # By identity: two equal patches are two.
        active[:] = [one for one in active if one is not patch]


def named(layers: Iterable[int]) -> str:
    """Return ``layer 3``, ``layers 3 to 7`` or ``layers 3, 5, 9``."""
    numbers = sorted(layers)
    if len(numbers) < 2:
        return f"layer {numbers[0]}" if numbers else "no layer"
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"layers {numbers[0]} to {numbers[-1]}"
    return f"layers {', '.join(map(str, numbers))}"
