"""What a transform stores beside the model: tensors under labels, a folder of safetensors files for each label.

The files grow layer by layer in the work folder, as the model's do, and become ``beside/<label>/`` of the run when all
are there, with ``beside/manifest.json`` about them. A label's folder has an index like that of a checkpoint.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from graftwork.errors import UserError
from graftwork.files import atomic_folder, safetensors_header, sha256, write_json_atomic
from graftwork.transform.source import INDEX
from graftwork.transform.writer import file_name, save_whole

FOLDER = "beside"
MANIFEST = "manifest.json"
_ABOUT = "graftwork"
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass
class Stored:
    """What transforms have stored beside one layer, or outside the layers."""

    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(
        self, label: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Add tensors (keys are parameters' names in the model) and what their file's header says.

        Raises:
            ValueError: a label that cannot be a folder's name, or a key that the label has already.
        """
        if not _LABEL.fullmatch(label):
            raise ValueError(f"'{label}' is no label: it is made of letters, digits, '-', '_' and '.'")
        mine = self.tensors.setdefault(label, {})
        twice = mine.keys() & tensors.keys()
        if twice:
            raise ValueError(f"'{label}' has '{min(twice)}' already")
        mine.update(tensors)
        self.metadata.setdefault(label, {}).update(metadata or {})


class Beside:
    """The files of all labels in ``work``."""

    def __init__(self, work: Path, layers: int) -> None:
        self.folder = work / FOLDER
        self._count = layers + 2

    def write(self, number: int, stored: Stored) -> None:
        """Write what belongs to file ``number`` of the model, each file whole or not at all.

        Raises:
            UserError: the place cannot be written, or the disk is full.
        """
        for label, tensors in stored.tensors.items():
            path = self.folder / label / file_name(number, self._count)
            # One entry, because safetensors writes several in an order that changes from run to run.
            about = json.dumps(stored.metadata[label], sort_keys=True)
            save_whole(path, tensors, {_ABOUT: about})

    def finish(self, target: Path, about: Callable[[], Mapping[str, Any]]) -> int:
        """Make the files ``target``, with a manifest of what transforms say ``about`` them; return their bytes.

        Where ``target`` is there it is complete: a run that was cut off behind this goes on. Nothing is made where
        nothing was stored.

        Raises:
            UserError: the place cannot be written, or the disk is full.
        """
        if not self.folder.is_dir() or target.is_dir():
            return 0
        total, labels = 0, {}
        try:
            with atomic_folder(target) as folder:
                for label in sorted(path for path in self.folder.iterdir() if path.is_dir()):
                    (folder / label.name).mkdir()
                    places: dict[str, str] = {}
                    size = 0
                    for path in sorted(label.glob("*.safetensors")):
                        os.link(path, folder / label.name / path.name)
                        for key, entry in safetensors_header(path).items():
                            places[key] = path.name
                            size += entry["data_offsets"][1] - entry["data_offsets"][0]
                    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
                    write_json_atomic(folder / label.name / INDEX, index)
                    files = sorted(set(places.values()))
                    labels[label.name] = {
                        "bytes": size,
                        "sha256": {name: sha256(label / name) for name in files},
                    }
                    total += size
                write_json_atomic(folder / MANIFEST, {"labels": labels, "transforms": dict(about())})
        except OSError as error:
            raise UserError(f"'{target}' cannot be written: {error.strerror or error}") from None
        return total


def read_beside(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of one label, ``folder`` being ``<run>/beside/<label>``.

    Raises:
        UserError: it is no such folder, or a file is missing.
    """
    found: dict[str, torch.Tensor] = {}
    for path, keys in beside_files(folder).items():
        with safe_open(path, framework="pt", device="cpu") as reader:
            found |= {key: reader.get_tensor(key) for key in keys}
    return found


def metadata_of(path: Path) -> dict[str, str]:
    """Return what a file that was stored beside a model says of its tensors; empty for any other file."""
    with safe_open(path, framework="pt", device="cpu") as reader:
        return json.loads((reader.metadata() or {}).get(_ABOUT, "{}"))


def beside_files(folder: Path) -> dict[Path, list[str]]:
    """Return the files of one label with the keys that each holds. Raises: see :func:`read_beside`."""
    files: dict[Path, list[str]] = {}
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        for key, name in index["weight_map"].items():
            files.setdefault(folder / name, []).append(key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"'{folder}' holds nothing that a transform has stored: it has no {INDEX}") from None
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise UserError(f"'{folder}' lacks the file '{missing[0]}' that its index lists; copy the rest")
    return files
