"""A JSONL file of answers that can be gone on with: each line whole, in the order of the prompts.

``<file>.settings.json`` beside it says how the answers are made. A run goes on only with the same ones.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from graftwork.errors import UserError
from graftwork.files import not_written, write_json_atomic

OURS = ("answer", "tokens", "index")
"""What a line has besides the fields of the record; a field of such a name is kept as ``input_<name>``."""


def line_fields(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of ``record`` as they stand in its line of the output.

    Raises:
        UserError: two fields would have the same name.
    """
    fields: dict[str, Any] = {}
    for name, value in record.items():
        kept = f"input_{name}" if name in OURS else name
        if kept in fields or (kept != name and kept in record):
            raise UserError(
                f"{where}: '{name}' would be written as '{kept}', which is there already; rename one of them"
            )
        fields[kept] = value
    return fields


class AnswerFile:
    """Answers at ``path``, made under ``settings`` (JSON values).

    ``done`` is how many whole lines are there already. Nothing is written before :meth:`open`.

    Raises:
        UserError: the file is there and ``resume`` is off; it was made under other settings; it is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        if path.is_dir():
            raise UserError(f"'{path}' is a folder; --output names a file")
        self.path = path
        self.beside = path.with_name(f"{path.name}.settings.json")
        self.settings = json.loads(json.dumps(settings))
        if path.exists() and not resume:
            if _held(path):
                raise self._in_use()
            raise UserError(
                f"'{path}' already exists; add --resume to go on with it, or name another --output"
            )
        if resume:
            self._check_settings()
        self.done = self._count()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Hold the file and cut off a line that was not finished; :meth:`write` appends.

        Where nothing was written in the end, nothing that was not there before is left behind.

        Raises:
            UserError: another process holds it, or it cannot be written.
        """
        made = [path for path in (self.path, self.beside) if not path.exists()]
        with _written(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("ab", buffering=0)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._in_use() from None
            except OSError:
                # Some network file systems have no locks.
                pass
            before = self.done
            self.done = self._count()
            # Where the other has removed it meanwhile, what is held here has no name any more.
            if self.done != before or not self.path.exists() or not _same_file(file, self.path):
                raise UserError(
                    f"'{self.path}' was written by another process meanwhile; try again with --resume"
                )
            try:
                write_json_atomic(self.beside, self.settings)
                with _written(self.path):
                    os.truncate(self.path, self.length)
                self.file: BinaryIO | Any = file
                yield
            finally:
                if not self.done:
                    for path in made:
                        path.unlink(missing_ok=True)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line, whole or not at all."""
        line = memoryview((json.dumps(record, ensure_ascii=False) + "\n").encode())
        length = self.length + len(line)
        try:
            with _written(self.path):
                while line:
                    line = line[self.file.write(line) :]
        except UserError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self.length)
            raise
        self.length = length
        self.done += 1

    def _in_use(self) -> UserError:
        return UserError(
            f"'{self.path}' is being written by another process; wait for it or name another --output"
        )

    def _count(self) -> int:
        """Return the number of whole lines; ``length`` is where they end."""
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        self.length = sum(len(line) + 1 for line in lines)
        for index, line in enumerate(lines):
            try:
                good = json.loads(line)["index"] == index
            except (ValueError, KeyError, TypeError):
                good = False
            if not good:
                raise UserError(
                    f"'{self.path}' line {index + 1} is not what was written there; name another --output"
                )
        return len(lines)

    def _check_settings(self) -> None:
        if not self.beside.exists():
            # An empty one is left by a run that was killed at once.
            if self.path.exists() and self.path.stat().st_size:
                raise UserError(
                    f"'{self.path}' has no '{self.beside.name}' beside it, which says how its answers were made; "
                    f"name another --output"
                )
            return
        try:
            before = json.loads(self.beside.read_text(encoding="utf-8"))
            keys = sorted({*before, *self.settings})
        except (ValueError, TypeError):
            raise UserError(f"'{self.beside}' is damaged; name another --output") from None
        for key in keys:
            old, new = before.get(key), self.settings.get(key)
            if old == new:
                continue
            if key == "input":
                raise UserError(
                    f"'{self.path}' holds answers to another input; give the same one or name another --output"
                )
            raise UserError(
                f"'{self.path}' was made with other settings: '{key}' was {json.dumps(old)} and is now "
                f"{json.dumps(new)}; give the same ones or name another --output"
            )


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from None


def _held(path: Path) -> bool:
    """Return whether another process writes ``path``."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _same_file(file: BinaryIO | Any, path: Path) -> bool:
    return os.path.samestat(os.fstat(file.fileno()), path.stat())
