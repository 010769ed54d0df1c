"""Fixtures: a base with three experts, and the command line in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Without a GPU kernels run in Triton's interpreter, which must be said before Triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from graftwork.cli import main
from graftwork.testing.experts import tiny_experts

Family = tuple[Path, dict[str, str]]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is made once out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFTWORK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return tiny_experts(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def half_family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return tiny_experts(tmp_path_factory.mktemp("half"), dtype=torch.bfloat16)


@pytest.fixture
def trainer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def call(*words: object) -> tuple[int, str, str]:
        arguments = [str(word) for word in words]
        monkeypatch.setattr("sys.argv", ["trainer", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return call
