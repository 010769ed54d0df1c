"""What a combination of plugins leaves behind, to be compared with what others leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.testing.composition.reading import Reading


@dataclass
class Trail:
    """What a combination left to be measured, and where its model lies."""

    model: str
    numbers: dict[str, Any] = field(default_factory=dict)
    reading: Reading | None = None
    decoders: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def marks(self) -> dict[str, Any]:
        """What a plugin must change in some way to have an effect."""
        found = dict(self.numbers)
        if self.reading is not None:
            found |= asdict(self.reading)
        return found


class Broken(Exception):
    """The combination ran into something that is no refusal, or wrote what is not what it measured."""
