"""Write a checkpoint layer by layer: the files grow in a work folder, which becomes the model when all are there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from graftwork.errors import UserError
from graftwork.files import atomic_folder, not_written, safetensors_header, write_json_atomic
from graftwork.transform.format import index_name

# What else of a model's folder belongs to it: tokenizer, chat template, generation settings.
_BESIDE = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "generation_config.json",
)


class Writer:
    """Files of a checkpoint in ``work``: one for the embedding, one per layer, one for final norm and head."""

    def __init__(self, work: Path, layers: int) -> None:
        self.work = work
        self._count = layers + 2

    def write(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write file ``number`` (0: embedding; 1 ...: layers; last: norm and head), whole or not at all.

        Raises:
            UserError: the place cannot be written, or the disk is full.
        """
        save_whole(self._path(number), tensors, {"format": "pt"})

    def read(self, number: int) -> dict[str, torch.Tensor]:
        """Return what file ``number`` holds."""
        return load_file(self._path(number))

    def has(self, number: int) -> bool:
        """Return whether file ``number`` is there."""
        return self._path(number).is_file()

    def finish(self, target: Path, config: Mapping[str, Any], beside: Path | None) -> int:
        """Put index, config and what lies ``beside`` the old model to the files; they become ``target``.

        Where ``target`` has these very files already, an earlier run was cut off just behind this, and it is complete.

        Returns:
            The bytes of all weights.

        Raises:
            UserError: the place cannot be written, or the disk is full.
        """
        places: dict[str, str] = {}
        total = 0
        for number in range(self._count):
            path = self._path(number)
            for name, entry in safetensors_header(path).items():
                places[name] = path.name
                total += entry["data_offsets"][1] - entry["data_offsets"][0]
        if self._is_mine(target):
            return total
        try:
            with atomic_folder(target) as folder:
                for number in range(self._count):
                    os.link(self._path(number), folder / self._path(number).name)
                write_json_atomic(folder / "config.json", config)
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
                write_json_atomic(folder / index_name(config), index)
                for path in _beside(beside):
                    shutil.copyfile(path, folder / path.name)
        except FileExistsError:
            raise UserError(f"'{target}' is there already; name another --output") from None
        except OSError as error:
            raise not_written(target, error) from None
        return total

    def _is_mine(self, target: Path) -> bool:
        """Return whether the weights in ``target`` are the files here, under a second name."""
        paths = [self._path(number) for number in range(self._count)]
        return all((target / path.name).is_file() and path.samefile(target / path.name) for path in paths)

    def _path(self, number: int) -> Path:
        return self.work / file_name(number, self._count)


def file_name(number: int, count: int) -> str:
    """Return what file ``number`` (from 0) of ``count`` is called."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def save_whole(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to ``path``, whole or not at all.

    Raises:
        UserError: the place cannot be written, or the disk is full.
    """
    # Two names of one tensor would be stored twice; safetensors refuses them.
    values = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    aside = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Straight from the tensors: a string of bytes of the largest would be as large again, twice.
        save_file(values, aside, metadata=dict(metadata))
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (SafetensorError, OSError) as error:
        aside.unlink(missing_ok=True)
        raise not_written(path, error) from None


def _beside(folder: Path | None) -> list[Path]:
    """Return what lies beside a model's weights and belongs to it."""
    if folder is None:
        return []
    return sorted({path for pattern in _BESIDE for path in folder.glob(pattern) if path.is_file()})
