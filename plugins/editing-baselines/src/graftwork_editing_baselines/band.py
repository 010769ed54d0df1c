"""Which layers a method writes to, where the user names none: the reference's band, as shares of the depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftwork.errors import UserError
from graftwork.transform.structure import find_layers


def band(model: Any, layers: Sequence[int] | None, first: float, last: float, name: str) -> list[int]:
    """Return ``layers``, checked and sorted, or those from ``first`` to ``last`` as shares of the model's depth.

    Raises:
        UserError: a layer that the model does not have, or one named twice.
    """
    count = len(find_layers(model)[1])
    if layers is None:
        low = min(count - 1, round(first * count))
        return list(range(low, max(low, min(count - 1, round(last * count))) + 1))
    if not layers or len(set(layers)) != len(layers):
        raise UserError(f"plugins.{name}.layers = {list(layers)}: name each layer once, and one at least")
    bad = [one for one in layers if not 0 <= one < count]
    if bad:
        raise UserError(f"plugins.{name}.layers: the model has layers 0 to {count - 1}, so no layer {bad[0]}")
    return sorted(layers)
