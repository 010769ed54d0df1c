"""How long the command line takes to start, against importing what it is built on."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from graftwork.testing.packages import install_plugin
from measured import in_pairs

pytestmark = pytest.mark.slow
TRAINER = str(Path(sys.executable).with_name("trainer"))
PEER = [sys.executable, "-c", "import pluggy, click"]
PAIRS = 41


def allowed(peer: float) -> float:
    return 1.5 * peer + 0.060


def seconds(command: list[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


@pytest.mark.parametrize("verb", ["--help", "plugins list"])
@pytest.mark.parametrize("dummies", [0, 200])
def test_startup(verb: str, dummies: int, record: Any, tmp_path: Path) -> None:
    for number in range(dummies):
        install_plugin(tmp_path, f"dummy-{number}", f"dummy_{number}:Dummy")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    plugins = len(importlib.metadata.entry_points(group="graftwork.plugins")) + dummies
    command = [TRAINER, *verb.split()]
    listed = subprocess.run([TRAINER, "plugins", "list"], env=environment, capture_output=True, check=True)
    assert len(listed.stdout.splitlines()) == plugins + 1
    ours, peer = in_pairs(
        lambda: seconds(command, environment),
        lambda: seconds(PEER, environment),
        pairs=PAIRS,
        label=f"trainer {verb}, {plugins} plugins",
    )
    record(
        "startup",
        (f"trainer {verb}, {plugins} plugins", ours),
        ("1.5 x import pluggy, click + 60 ms", peer),
        limit=1.0,
        unit="s",
        allowed=allowed,
    )
