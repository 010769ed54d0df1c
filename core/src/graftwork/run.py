"""A Run: one job's directory, manifest, seed, events, and everything else a hook may ask for."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.console import Console
from graftwork.errors import UserError
from graftwork.files import is_leftover, not_written, write_json_atomic
from graftwork.plugins import Plugins
from graftwork.recipe import Job

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"
LOCK = ".lock"


class Events:
    """``metrics.jsonl``: one JSON object per line, appended as things happen.

    Only the main process writes. ``position`` is the file's length in bytes; a checkpoint remembers
    it and a resumed run cuts the file back to it, so the record continues without doubles.
    """

    def __init__(self, path: Path, main: bool = True) -> None:
        self.path = path
        self.main = main

    def write(self, event: str, **fields: Any) -> None:
        if not self.main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **fields}) + "\n")

    @property
    def position(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, position: int) -> None:
        """Forget everything after ``position``."""
        if self.main and self.path.exists():
            os.truncate(self.path, min(position, self.position))

    def read(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            with self.path.open(encoding="utf-8") as file:
                for line in file:
                    yield json.loads(line)


@dataclass
class Run:
    """What a hook gets: the resolved job, where it writes, and what it logs to.

    Attributes:
        directory: the run directory.
        job: the job with every option resolved (``run.job.train`` are the trainer's own fields).
        plugins: the plugins of this run.
        events: the record of what happened; ``run.events.write("name", key=value)``.
        rank, world_size: of this process.
        console: lines and progress bars for the user; silent in all processes but the main one.
    """

    directory: Path
    job: Job
    plugins: Plugins = field(default_factory=Plugins)
    rank: int = 0
    world_size: int = 1
    console: Console = field(default_factory=lambda: Console(enabled=False))

    def __post_init__(self) -> None:
        self.events = Events(self.directory / METRICS, main=self.main)

    @property
    def seed(self) -> int:
        return self.job.seed

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @property
    def stages(self) -> Path:
        return self.directory / "stages"

    @property
    def result_path(self) -> Path:
        return self.directory / RESULT

    def manifest(self) -> dict[str, Any]:
        """Return what is needed to repeat this run."""
        return {
            "job": self.job.model_dump(mode="json"),
            "plugins": self.plugins.versions(),
            "seed": self.seed,
            "world_size": self.world_size,
            "versions": versions(),
            "hardware": hardware(),
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def open(self, *, resume: bool, allow_other_versions: bool = False) -> None:
        """Create the directory and its manifest, or check that it is this run's and may go on.

        Raises:
            UserError: the directory holds a run and ``resume`` is off, or another run than this one,
                or one made with other plugin versions and ``allow_other_versions`` is off.
        """
        if not self.main:
            # The main process may have written the manifest already; it refuses for all of them.
            return
        path = self.directory / MANIFEST
        manifest = self.manifest()
        if path.exists():
            if not resume:
                raise UserError(
                    f"'{self.directory}' already holds a run; add --resume to go on with it, or name another --output"
                )
            try:
                previous = json.loads(path.read_text(encoding="utf-8"))
                before, versions = dict(previous["job"]), dict(previous["plugins"])
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"'{path}' is not a manifest that a run wrote; cannot resume from it"
                ) from None
            _same_job(before, manifest["job"], path)
            if not allow_other_versions:
                _same_versions(versions, manifest["plugins"], path)
            if previous.get("world_size") != self.world_size:
                raise UserError(
                    f"'{path}' was written by {previous.get('world_size')} processes, this run has "
                    f"{self.world_size}; resume with the same number"
                )
            return
        if self.directory.exists() and not all(map(_before_all, self.directory.iterdir())):
            raise UserError(f"'{self.directory}' is not empty and holds no run; name another --output")
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, manifest)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run directory for this process; a second one is refused."""
        if not self.main:
            yield
            return
        with lock_folder(self.directory):
            yield


@contextlib.contextmanager
def lock_folder(directory: Path) -> Iterator[None]:
    """Hold ``directory`` against a second process; the lock dies with the process.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = (directory / LOCK).open("w")
    except OSError as error:
        raise not_written(directory, error) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"'{directory}' is in use by another process; wait for it or name another --output"
            ) from None
        yield


def _before_all(entry: Path) -> bool:
    """Return whether a run that was killed before it had a manifest leaves such an entry."""
    return entry.name == LOCK or is_leftover(entry, MANIFEST)


def _same_job(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise UserError(
                f"'{path}' belongs to a run with other settings: '{key}' was {json.dumps(before.get(key))} "
                f"and is now {json.dumps(now.get(key))}; resume with the same settings or name another --output"
            )


def _same_versions(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    for name in now:
        kept = before.get(name)
        old, new = kept.get("version") if isinstance(kept, dict) else None, now[name]["version"]
        if old != new:
            raise UserError(
                f"'{path}' was written with plugin '{name}' {old}, installed is {new}; install {old}, "
                f"or add --allow-other-versions to go on all the same"
            )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide what a run computes."""
    packages = ("graftwork", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {**found, "python": platform.python_version()}


def hardware() -> dict[str, Any]:
    """Return the machine in a few words."""
    import torch

    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
