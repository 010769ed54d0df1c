"""Files that are complete or absent: written aside, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from graftwork.errors import UserError, first_line

LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself reads no longer one."""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITTEN = {
    **dict.fromkeys(NO_ROOM, "the disk is full; make room there, or name another place"),
    errno.EFBIG: "files may not grow so large there; name another place",
    errno.EROFS: "the file system is read-only; name another place",
    errno.EACCES: "permission denied; name a place that you may write to",
    errno.EPERM: "permission denied; name a place that you may write to",
    errno.EIO: "the device failed; name another place",
}
_TORN = ("PytorchStreamWriter", "inline_container", "iostream error")
"""What torch says of a file that it could not write; it does not say why."""


def not_written(path: Path | str, error: BaseException) -> UserError:
    """Return in one sentence that ``path`` could not be written, why, and what would help."""
    reason = _reason(error)
    if reason is None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return UserError(f"'{path}' cannot be written: {reason}")


@contextlib.contextmanager
def told_when_not_written(folder: Path, more: str = "") -> Iterator[None]:
    """Say in one sentence what could not be written in or below ``folder``, whoever was writing.

    ``more`` follows the sentence. What else is raised goes on as it is, such as of files that cannot be read.

    Raises:
        UserError: something could not be written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for one in _chain(error):
            place = getattr(one, "filename", None)
            inside = isinstance(place, str) and Path(place).absolute().is_relative_to(folder.absolute())
            denied = isinstance(one, OSError) and one.errno in (errno.EACCES, errno.EPERM, errno.EIO)
            # Not allowed, it may have been reading somewhere else.
            if _reason(one) is not None and (inside or not denied):
                told = not_written(place if isinstance(place, str) and inside else folder, one)
                raise UserError(f"{told}{more}") from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in _NOT_WRITTEN:
        return _NOT_WRITTEN[error.errno]
    # By its text, because safetensors and torch report what the system says as errors of their own.
    for code in (*NO_ROOM, errno.EFBIG, errno.EROFS):
        if os.strerror(code) in str(error):
            return _NOT_WRITTEN[code]
    torn = isinstance(error, RuntimeError) and any(word in str(error) for word in _TORN)
    return _NOT_WRITTEN[errno.ENOSPC] if torn else None


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` to ``path``; see :func:`write_bytes_atomic`."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the whole new one.

    Raises:
        UserError: the place cannot be written, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside, descriptor = _make_aside(path, _new_file)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise not_written(path, error) from None


def write_json_atomic(path: Path, value: Any) -> None:
    """Write ``value`` as JSON; see :func:`write_text_atomic`."""
    write_text_atomic(path, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; it becomes ``path`` when the block ends well, and vanishes otherwise.

    Leftovers of attempts that were killed are removed; those of living processes stay.

    Raises:
        FileExistsError: something is already at ``path`` when the block ends.
        UserError: the place cannot be written, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside, descriptor = _make_aside(path, _new_folder)
    except OSError as error:
        raise not_written(path, error) from None
    try:
        yield aside
        _settle(aside)
        try:
            os.rename(aside, path)
        except OSError:
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            raise
        _flush(path.parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if any(os.strerror(code) in str(error) for code in NO_ROOM):
            raise not_written(path, error) from error
        raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder of this process beside ``path``, which need not be there; it vanishes afterwards.

    Leftovers of attempts that were killed are removed; those of living processes stay.

    Raises:
        UserError: the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside, descriptor = _make_aside(path, _new_folder)
    except OSError as error:
        raise not_written(path.parent, error) from None
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(descriptor)


def discard(path: Path) -> None:
    """Remove a folder so that nobody ever sees half of it; what an attempt that was killed left of it goes, too."""
    _sweep(path)
    aside = path.with_name(f".{path.name}-{secrets.token_hex(4)}.part")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def is_leftover(path: Path, of: str) -> bool:
    """Return whether ``path`` is what an attempt to write a file or folder named ``of`` leaves when it is killed."""
    return re.fullmatch(rf"\.{re.escape(of)}-[0-9a-f]{{8}}\.part", path.name) is not None


@contextlib.contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``, after waiting for whoever holds it; it is released if the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        # Some network file systems have no locks; there the callers' renames must be enough.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safetensors_header(path: Path) -> dict[str, Any]:
    """Return what a safetensors file says it holds: name: dtype, shape, data_offsets.

    Raises:
        UserError: it is missing, or header and size do not agree. What is claimed is held against the file before it is
            read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, LONGEST_HEADER):
                raise ValueError
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError
    except (ValueError, struct.error, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"'{path}' is damaged or no safetensors file: its header and its size do not agree"
        ) from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from None
    return header


def cache_folder() -> Path:
    """Return where things made once are kept: ``GRAFTWORK_CACHE``, or a folder in the user's cache."""
    named = os.environ.get("GRAFTWORK_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graftwork"
    return Path(named) if named else base


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder ``name`` of the cache, filled by ``make`` the first time."""
    folder = cache_folder() / name
    if not folder.exists():
        # Another process may be quicker; its folder is as good as ours.
        with contextlib.suppress(FileExistsError), atomic_folder(folder) as building:
            make(building)
    return folder


# ---------------------------------------------------------------------- the sibling that is filled


def _make_aside(path: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """Return a new sibling of ``path`` and its descriptor; its lock tells the living from the killed."""
    _sweep(path)
    while True:
        aside = path.with_name(f".{path.name}-{secrets.token_hex(4)}.part")
        try:
            descriptor = make(aside)
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        except KeyboardInterrupt:
            _remove(aside)
            raise
        if aside.exists():
            return aside, descriptor
        os.close(descriptor)  # swept by another process before it was locked


def _sweep(path: Path) -> None:
    for leftover in path.parent.glob(f".{glob.escape(path.name)}-*.part"):
        with contextlib.suppress(OSError):
            descriptor = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(leftover)
            finally:
                os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _new_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


def _new_folder(path: Path) -> int:
    path.mkdir()
    return os.open(path, os.O_RDONLY)


def _settle(folder: Path) -> None:
    """Flush everything below ``folder`` to disk, readable for whom the umask allows."""
    readable = folder.stat().st_mode & 0o444
    for entry in [*folder.rglob("*"), folder]:
        if entry.is_file() and not entry.is_symlink():
            # safetensors writes files that nobody but their owner can read.
            entry.chmod(entry.stat().st_mode & 0o7777 | readable)
        _flush(entry)


def _flush(entry: Path) -> None:
    descriptor = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
