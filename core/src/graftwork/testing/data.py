"""Generated task streams and questions in the real on-disk layouts, small enough for a tiny model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def tiny_questions(count: int = 12) -> list[dict[str, Any]]:
    """Return invented questions with a true and a counterfactual document each, in the layout of RGB."""
    places = ["Arn", "Belt", "Cove", "Dorn", "Elm", "Fenn"]
    found = []
    for index in range(count):
        truth, other = places[index % 6], places[(index + 1 + index // 6) % 6]
        name = f"Lake {index}"
        found.append(
            {
                "id": index,
                "query": f"Where is {name}?",
                "answer": truth,
                "fakeanswer": other,
                "positive": [f"{name} lies in {truth}."],
                "positive_wrong": [f"{name} lies in {other}."],
                "negative": [f"{name} is deep."],
            }
        )
    return found


def tiny_sums(folder: Path, *, train: int = 40, test: int = 8) -> Path:
    """Write prompts with one exact answer each (``3+1=``, ``4``) as ``train.jsonl`` and ``test.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, numbers in (("train", range(train)), ("test", range(train, train + test))):
        rows = [{"prompt": f"{number}+1=", "completion": f"{number + 1}"} for number in numbers]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
