"""Packed masks that a merge has stored beside a model, read again."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

from graftwork.errors import UserError
from graftwork.merge.masks import FORMAT, Bits
from graftwork.transform.beside import beside_files, metadata_of


def read_masks(folder: Path, *, base_sha256: str | None = None) -> dict[str, Bits]:
    """Return the masks in ``<run>/beside/<label>`` by the names of the parameters.

    ``base_sha256``: of the model that they are for, where it is known.

    Raises:
        UserError: it holds no masks, a file is missing, or they are for another base.
    """
    found: dict[str, Bits] = {}
    for path, keys in beside_files(folder).items():
        metadata = metadata_of(path)
        if metadata.get("format") != FORMAT:
            raise UserError(f"'{path}' holds no masks of the format {FORMAT}")
        made_for = metadata.get("base_sha256")
        if base_sha256 is not None and made_for != base_sha256:
            raise UserError(
                f"'{path}' holds masks for another base (its files' SHA-256 begins with {str(made_for)[:12]}, here "
                f"it is {base_sha256[:12]}); name the base that they were made with"
            )
        columns = json.loads(metadata["columns"])
        with safe_open(path, framework="pt", device="cpu") as reader:
            found |= {key: Bits(reader.get_tensor(key), columns[key]) for key in keys}
    return found
