"""Generated task streams in the real on-disk layouts, small enough for a tiny model to learn."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

LABELS = {
    "fruit": ["apple", "pear"],
    "metal": ["iron", "gold"],
    "colour": ["red", "blue"],
    "animal": ["cat", "dog"],
}


def tiny_stream(
    folder: Path,
    names: Sequence[str] = ("fruit", "metal", "colour"),
    *,
    train: int = 32,
    test: int = 12,
    seed: int = 0,
) -> Path:
    """Write classification tasks in the CL benchmark's layout and return ``folder``.

    A sentence of task ``name`` holds one of two marker letters that decides its label.
    """
    generator = random.Random(seed)
    instructions = {}
    for number, name in enumerate(names):
        group = f"G{number}"
        labels = LABELS.get(name, [f"{name}-a", f"{name}-b"])
        place = folder / group / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "labels.json").write_text(json.dumps(labels))
        for part, count in (("train", train), ("test", test)):
            items = []
            for index in range(count):
                noise = "".join(generator.choices("mnopqr", k=4))
                items.append({"sentence": f"{noise}{index}{'xy'[index % 2]}", "label": labels[index % 2]})
            (place / f"{part}.json").write_text(json.dumps(items))
        instructions[group] = [{"instruction_type": "zero-shot", "instruction": f"Which {name}?\n"}]
    (folder / "instructions.json").write_text(json.dumps(instructions))
    return folder
