"""Fixtures: a cache of its own, the tiny tokenizer, and second moments of tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graftwork.console import Console
from graftwork.edit.edits import EditSet
from graftwork.edit.statistics import Statistics
from graftwork.testing.editing import REQUESTS, corpus
from graftwork.testing.models import tiny_tokenizer

Edit = Callable[..., EditSet]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("GRAFTWORK_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def edit(tokenizer: Any) -> Edit:
    """Return a function that edits a model with a plugin's editor and options."""

    def run(plugin: Any, model: Any, requests: Any = REQUESTS, editor: Any = None, **options: Any) -> EditSet:
        editor = editor or plugin.editor(plugin.Options.model_validate({"max_share": 50.0, **options}))
        statistics = Statistics(model, tokenizer, corpus())
        return editor.edit(model, tokenizer, requests, statistics, console=Console(enabled=False), seed=0)

    return run
