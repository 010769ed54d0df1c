"""``trainer plugins check``: our own plugins pass, and one that breaks a promise is told what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graftwork.testing.conformance import check

# One of each kind, as each costs some seconds; `make check` takes all.
PLUGINS = ["sparta", "tpaw", "cad", "memit"]

LAX = """
from graftwork import hookimpl
from pydantic import BaseModel, Field

class Options(BaseModel):
    silent: int = Field(1, ge=1)

    def __init__(self, **values):
        values.setdefault("silent", 1)
        super().__init__(**{**values, "silent": abs(values["silent"]) + 1})

class Plugin:
    Options = Options

    def __init__(self, options):
        pass

print("hello")
"""


@pytest.mark.parametrize("name", PLUGINS)
def test_ours_keep_every_promise_that_needs_no_model(name: str, tmp_path: Path) -> None:
    found = check(name, tmp_path, static=True)
    assert len(found) == 8
    assert [one for one in found if one.verdict == "failed"] == []


def test_ours_keep_those_of_their_smoke_recipe(trainer: Callable[..., Any]) -> None:
    outcome = trainer("plugins", "check", "rtn")
    assert outcome.code == 0, outcome.out
    assert "same seed, same numbers  passed: bit for bit" in outcome.out
    assert "a finished run is left alone" in outcome.out
    assert "nothing failed" in outcome.out


def test_what_a_plugin_breaks_is_told_with_what_to_do(
    install: Any, trainer: Callable[..., Any], tmp_path: Path
) -> None:
    install("lax", "lax_module", LAX)
    found = {one.name: one for one in check("lax", tmp_path, static=True)}
    told = {
        "package's metadata": "write `description`",
        "README and provenance": 'write `readme = "README.md"`',
        "class and hooks": "no docstring",
        "options": 'extra="forbid"',
        "bad options": "option 'no-such-option' takes 1",
        "recipes": "it ships no recipe; put one at lax_module/recipes/claim.yaml",
    }
    for name, words in told.items():
        assert found[name].verdict == "failed", name
        assert words in found[name].detail
    assert found["defaults"].verdict == "passed"
    outcome = trainer("plugins", "check", "lax", "--static")
    assert outcome.code == 1
    assert "failed" in outcome.out
    assert trainer("plugins", "check", "no-such-plugin").code == 2
