"""What the tests of faults share: one process that forks, small inputs, the commands that are disturbed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from graftwork.testing.faults import make_inputs, read_workloads
from graftwork.testing.hub import Hub, hub
from graftwork.testing.models import tiny_checkpoint
from graftwork.testing.processes import Started, Warm, warm
from graftwork.testing.same import differences

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with one tiny model under any name of the owner ``tiny``."""
    with hub(tiny_checkpoint(tmp_path_factory.mktemp("served") / "model")) as server:
        yield server


@pytest.fixture(scope="session")
def server(served: Hub, cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """What starts commands; the hub that they know is on this machine."""
    home = tmp_path_factory.mktemp("home")
    env = {
        "HF_ENDPOINT": served.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    with warm(env) as starter:
        yield starter


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {**make_inputs(tmp_path_factory.mktemp("inputs")), "here": HERE}


@dataclass
class Commands:
    """Starts the commands of ``workloads.yaml``; the outputs of undisturbed runs are kept, one for each."""

    server: Warm
    inputs: dict[str, Path]
    kept: Path
    folder: Path

    @property
    def output(self) -> Path:
        """Where a command writes; always the same place, since paths stand in manifests."""
        return self.kept / "output"

    def words(self, name: str, output: Path | None = None) -> list[str]:
        (workload,) = read_workloads(HERE / "workloads.yaml", [name])
        return workload.filled({**self.inputs, "output": output or self.output})

    def start(self, name: str, *flags: str, log: str = "log", **options: Any) -> Started:
        self.output.mkdir(exist_ok=True)
        return self.server.start([*self.words(name), *flags], self.folder / log, **options)

    def run(self, name: str, *flags: str, **options: Any) -> Started:
        process = self.start(name, *flags, **options)
        process.wait()
        return process

    def whole(self, name: str) -> Path:
        """Return the output of an undisturbed run."""
        place = self.kept / name
        if not place.exists():
            aside = self.kept / "aside"
            if self.output.exists():
                self.output.rename(aside)
            process = self.run(name, log="whole")
            assert process.poll() == 0, process.said()
            self.output.rename(place)
            if aside.exists():
                aside.rename(self.output)
        return place

    def clear(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)

    def resumed(self, name: str) -> Started:
        """Go on, and check that all is as in an undisturbed run."""
        process = self.run(name, "--resume")
        assert process.poll() == 0, process.said()
        assert differences(self.whole(name), self.output) == []
        return process


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def commands(server: Warm, inputs: dict[str, Path], kept: Path, tmp_path: Path) -> Iterator[Commands]:
    made = Commands(server, inputs, kept, tmp_path)
    made.clear()
    yield made
    made.clear()


@pytest.fixture
def sentence() -> Callable[[Started], str]:
    """Return the one sentence by which a process has refused."""

    def told(process: Started) -> str:
        said = process.said()
        assert process.poll() == 2, said
        lines = [line for line in re.split(r"[\r\n]+", said) if line.startswith("error: ")]
        assert len(lines) == 1, said
        assert "Traceback" not in said
        return lines[0].removeprefix("error: ")

    return told
