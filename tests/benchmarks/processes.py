"""Programs in processes of their own, with what they used; and environments of peers that need other versions."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from graftwork.files import atomic_folder

# A small process in between starts the program and reaps it: the kernel counts what the starting process holds as
# the program's own peak, and a test process holds a model.
_REAPER = """
import json, os, sys
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
sys.stdout.write("\\n" + json.dumps([usage.ru_utime + usage.ru_stime, usage.ru_maxrss]) + "\\n")
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


@dataclass(frozen=True)
class Used:
    """What a process took: seconds of computing (all threads, imports and children included), and its largest
    resident memory in MiB; and the JSON object that was its last line of output, if it was one."""

    seconds: float
    peak_mib: float
    said: dict[str, Any]


def run_measured(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> Used:
    """Run ``command`` to its end.

    Seconds are those of the processor, not of the clock, so that what else runs on the machine counts little.
    """
    words = [sys.executable, "-S", "-c", _REAPER, *map(str, command)]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, usage = filter(None, done.stdout.splitlines())
    seconds, peak = json.loads(usage)
    last = lines[-1] if lines and lines[-1].startswith("{") else "{}"
    return Used(seconds, peak / 1024, json.loads(last))


def peer_python(name: str, requirements: Path) -> Path:
    """Return the Python of an environment with ``requirements``, made once and kept inside our own environment.

    Skips the test with the installer's reason where it cannot be made.
    """
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip(f"the environment of {name} needs uv beside this Python")
    links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    environment = {**os.environ, **({"UV_FIND_LINKS": links} if links else {})}
    key = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:12]

    def make(folder: Path) -> None:
        python = folder / "bin" / "python"
        for words in (
            ["venv", "--quiet", "--allow-existing", "--relocatable", "--python", sys.executable, folder],
            ["pip", "install", "--quiet", "--compile-bytecode", "--python", python, "-r", requirements],
        ):
            done = subprocess.run([uv, *words], capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                reason = " ".join(done.stderr.split())[-300:]
                pytest.skip(f"{name} cannot be installed here: {reason}")

    folder = Path(sys.prefix) / "peers" / f"{name}-{key}"
    if not folder.exists():
        with atomic_folder(folder) as building:
            make(building)
    return folder / "bin" / "python"
