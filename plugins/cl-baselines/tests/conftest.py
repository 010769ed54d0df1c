"""A tiny checkpoint and a tiny stream, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from graftwork.testing.data import tiny_stream
from graftwork.testing.models import tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stream(tmp_path_factory.mktemp("data") / "stream", ["fruit", "metal"], train=16, test=2)
