"""What is known of the unchanged model: its likelihoods of evaluation windows, measured once per model and text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwork.errors import UserError
from graftwork.files import cache_folder, write_json_atomic
from graftwork.train.checkpoints import read_json

if TYPE_CHECKING:
    from graftwork.transform.job import Prepared


def find(ready: Prepared) -> list[float] | None:
    """Return the mean negative log-likelihood of every evaluation window, if an earlier job has measured it."""
    path = _path(ready)
    known = read_json(path) if path is not None else None
    count = sum(len(windows) for windows in ready.windows.evaluation)
    if known is None or len(known.get("nll", ())) != count:
        return None
    return [float(value) for value in known["nll"]]


def keep(ready: Prepared, nll: list[float]) -> None:
    """Keep what was measured for later jobs; a cache that cannot be written is no reason to fail."""
    path = _path(ready)
    if path is None or not nll:
        return
    try:
        write_json_atomic(path, {"nll": nll})
    except UserError:
        return


def _path(ready: Prepared) -> Path | None:
    """Return the file of this model (by its files' names, sizes and times), precision, texts and library."""
    source: Any = ready.source
    folder = getattr(source, "folder", None)
    if folder is None or not ready.windows.evaluation:
        return None
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".json"))
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    model = ready.run.job.model.model_dump()
    about = [str(Path(folder).resolve()), stamps, model, str(source.dtype), torch.__version__]
    key = hashlib.sha256(json.dumps(about).encode())
    for windows in ready.windows.evaluation:
        key.update(str(tuple(windows.shape)).encode() + windows.numpy().tobytes())
    return cache_folder() / "unchanged" / f"{key.hexdigest()[:32]}.json"
