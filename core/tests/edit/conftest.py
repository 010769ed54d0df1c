"""Fixtures of the tests of edits: a cache of their own, the tiny tokenizer, second moments of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from graftwork.console import Console
from graftwork.edit.edits import EditSet
from graftwork.edit.statistics import Statistics
from graftwork.testing.editing import REQUESTS, PlainEditor, corpus, editable_model
from graftwork.testing.models import tiny_tokenizer

QUIET = Console(enabled=False)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GRAFTWORK_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def model() -> Any:
    return editable_model()


@pytest.fixture(scope="session")
def made(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> EditSet:
    """An edit set of both requests for ``editable_model()``."""
    alive = editable_model()
    statistics = Statistics(alive, tokenizer, corpus(), folder=tmp_path_factory.mktemp("moments"))
    return PlainEditor().edit(alive, tokenizer, REQUESTS, statistics, console=QUIET, seed=0)
