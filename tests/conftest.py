"""Fixtures of the tests that cross distributions: a tiny checkpoint, a tiny stream, the command line."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from graftwork.cli import main
from graftwork.testing.data import tiny_stream
from graftwork.testing.models import tiny_checkpoint
from graftwork.testing.packages import install_plugin


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is made once out of the user's own cache; the processes that tests start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFTWORK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, learned in the order colour, fruit."""
    return tiny_stream(tmp_path_factory.mktemp("data") / "stream", ("fruit", "colour"), train=32, test=8)


@pytest.fixture(scope="session")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where DeepSpeed compiles; kept over runs where the environment names a folder."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(named) if named else tmp_path_factory.mktemp("extensions")


@dataclass(frozen=True)
class Outcome:
    """What one call of ``trainer`` came to."""

    code: int
    out: str
    err: str


@pytest.fixture
def trainer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Outcome]:
    """Call the command line in this process, from an empty folder ``tmp_path/cwd``."""
    here = tmp_path / "cwd"
    here.mkdir()
    monkeypatch.chdir(here)

    def call(*arguments: object) -> Outcome:
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr("sys.argv", ["trainer", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(words)
        printed = capsys.readouterr()
        return Outcome(int(caught.value.code or 0), printed.out, printed.err)

    return call


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a plugin for one test: ``install(name, module, code)``, found like any other."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def call(name: str, module: str, code: str, target: str = "Plugin", package: str | None = None) -> None:
        install_plugin(site, name, f"{module}:{target}", code, package=package)
        importlib.invalidate_caches()

    yield call
    importlib.invalidate_caches()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many hostile cases were refused: `make hostile` prints nothing else worth reading."""
    count = {
        outcome: sum("test_hostile" in report.nodeid for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed", "error")
    }
    if tried := sum(count.values()):
        terminalreporter.write_line(f"hostile cases refused/tried: {count['passed']}/{tried}")
