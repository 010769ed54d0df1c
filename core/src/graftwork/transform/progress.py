"""How far a pass through a model has come: what was measured of every layer, kept so that a run can go on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from graftwork.files import write_json_atomic
from graftwork.transform.scheme import KVScheme

PROGRESS = "progress.json"


@dataclass
class LayerRecord:
    """What was measured of one layer.

    ``error`` is the squared error of the layer's output on the first batch, relative to the output's square;
    flatness as in :func:`graftwork.transform.figures.flatness`; ``bits`` of all that is stored of its linears,
    ``parameters`` of the linears before.
    """

    name: str
    error: float | None = None
    weights_flatness: tuple[float, float] | None = None
    inputs_flatness: tuple[float, float] | None = None
    bits: int = 0
    parameters: int = 0
    seconds: float = 0.0
    linears: dict[str, dict[str, float | str]] = field(default_factory=dict)


@dataclass
class Progress:
    """What is known of the layers that are done.

    ``descriptions`` say how each is stored, ``notes`` are sentences for the user, ``kv`` is how all of them round
    their keys and values.
    """

    records: list[LayerRecord] = field(default_factory=list)
    descriptions: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kv: KVScheme | None = None

    @property
    def layers(self) -> int:
        """How many layers are done."""
        return len(self.records)

    def save(self, folder: Path) -> None:
        """Write it to ``folder``, whole or not at all."""
        state = {
            "records": [asdict(record) for record in self.records],
            "descriptions": self.descriptions,
            "notes": self.notes,
            "kv": self.kv.model_dump() if self.kv is not None else None,
        }
        write_json_atomic(folder / PROGRESS, state)

    @classmethod
    def load(cls, folder: Path) -> Progress | None:
        """Return what was saved in ``folder``; None where nothing was."""
        path = folder / PROGRESS
        if not path.is_file():
            return None
        state = json.loads(path.read_text(encoding="utf-8"))
        kv = state["kv"]
        return cls(
            [LayerRecord(**record) for record in state["records"]],
            state["descriptions"],
            state["notes"],
            None if kv is None else KVScheme.model_validate(kv),
        )
