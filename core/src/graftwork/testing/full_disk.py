"""A disk that is full from the n-th attempt to write on, inside one process."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_PLACES = {"os.mkdir": 0, "os.rename": 1, "os.link": 1, "os.truncate": 0}
"""Where these events of Python's name the place that is written."""


def fill(below: str, at: int, trace: str, code: int = errno.ENOSPC) -> None:
    """Let this process fail to write below a folder, from its ``at``-th attempt on; it cannot be undone.

    Attempts are files opened for writing, made, linked, renamed, cut or flushed, and what safetensors and torch write
    by themselves, which stays torn. Removing is no attempt.

    Args:
        below: the folder.
        at: counted from 1; 0 for never.
        trace: a file elsewhere, which gets a line for every attempt.
        code: the error's number.
    """
    root = os.path.realpath(below)
    count = 0

    def full(what: str, place: Any) -> bool:
        nonlocal count
        if not isinstance(place, str | bytes | os.PathLike):
            return False
        path = os.path.realpath(os.fsdecode(place))
        if path != root and not path.startswith(root + os.sep):
            return False
        count += 1
        os.write(log, f"{what} {path}\n".encode())
        return bool(at) and count >= at

    def seen(event: str, arguments: tuple[Any, ...]) -> None:
        place = None
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES:
            place = arguments[0]
        elif event in _PLACES:
            place = arguments[_PLACES[event]]
        if place is not None and full(event, place):
            raise OSError(code, os.strerror(code), os.fsdecode(place))

    log = os.open(trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.addaudithook(seen)
    _flushes(full, code)
    _libraries(full, code)


def _flushes(full: Callable[[str, Any], bool], code: int) -> None:
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        if full("fsync", os.readlink(f"/proc/self/fd/{descriptor}")):
            raise OSError(code, os.strerror(code))
        flush(descriptor)

    os.fsync = fsync


def _libraries(full: Callable[[str, Any], bool], code: int) -> None:
    """Let safetensors and torch fail as they do: with errors of their own, and a torn file."""
    import safetensors.torch
    import torch
    from safetensors import SafetensorError

    library: Any = safetensors.torch
    serialize, save = library.serialize_file, torch.save

    def serialize_file(tensors: Any, filename: Any, *args: Any, **options: Any) -> None:
        if full("safetensors", filename):
            _tear(filename)
            raise SafetensorError(
                f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})"
            )
        serialize(tensors, filename, *args, **options)

    def torch_save(value: Any, file: Any, *args: Any, **options: Any) -> None:
        if full("torch.save", file):
            _tear(file)
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        save(value, file, *args, **options)

    library.serialize_file, torch.save = serialize_file, torch_save


def _tear(place: Any) -> None:
    # Not by Python's open, which is full, too.
    os.system(f"printf torn > {shlex.quote(os.fsdecode(place))}")


def fill_and_read_no_weights(**given: Any) -> None:
    """Do as :func:`fill`, and let this process end where it reads a model's weights."""
    from transformers import PreTrainedModel

    def read(*_: Any, **__: Any) -> None:
        raise RuntimeError("weights were read")

    fill(**given)
    PreTrainedModel.from_pretrained = classmethod(read)  # type: ignore[assignment]
