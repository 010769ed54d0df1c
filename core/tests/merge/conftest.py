"""Fixtures of the merging tests: a base with three experts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from graftwork.testing.experts import tiny_experts

sys.path.insert(0, str(Path(__file__).parent))  # for the methods beside the tests

Family = tuple[Path, dict[str, str]]


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return tiny_experts(tmp_path_factory.mktemp("family"))
