"""``trainer plugins check``: our own plugins pass, and one that breaks a promise is told what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graftwork.plugins import find
from graftwork.testing.conformance import check
from graftwork.testing.conformance.running import RUNNING
from graftwork.testing.conformance.trial import Failed, Trial, tools

# One of each kind, as each costs some seconds; `make check` takes all.
PLUGINS = ["tpaw", "memit"]

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


def test_ours_keep_those_that_run_a_model(trainer: Callable[..., Any]) -> None:
    outcome = trainer("plugins", "check", "interpolation")
    assert outcome.code == 0, outcome.out
    for words in (
        "smoke recipe                 passed",
        "works, saved and read again  passed: generate",
        "neutral setting              passed: the plain model, bit for bit",
        "same seed, same bits         passed: bit for bit",
        "killed and resumed           passed: 3 of 3 kills survived",
        "two processes                does not apply: it takes no part in training",
        "1 plugin: 13 passed, 0 failed, 1 does not apply",
    ):
        assert words in outcome.out


UNSTEADY = """
import time
from graftwork import LossTerm, hookimpl
from pydantic import BaseModel, ConfigDict, Field

class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    strength: float = Field(1.0, ge=0, description="of nothing in particular")

class Plugin:
    "Depends on the clock, and is never neutral."
    Options = Options
    neutral = {"strength": 0.0}

    def __init__(self, options): pass

    @hookimpl
    def loss_terms(self, run, model):
        shift = time.time() % 1
        return [LossTerm("clock", lambda model, batch: shift * sum(p.square().sum() for p in model.parameters()))]
"""


def test_a_plugin_that_depends_on_the_clock_is_told(install: Any, tmp_path: Path) -> None:
    install("clock", "clock_module", UNSTEADY)
    with tools(tmp_path) as shared:
        trial = Trial(find("clock"), tmp_path, shared)
        promises = dict(RUNNING)
        with pytest.raises(Failed, match="differ between two runs of the same seed"):
            promises["same seed, same bits"](trial)
        with pytest.raises(Failed, match="with its `neutral` options the plain model's losses"):
            promises["neutral setting"](trial)
        with pytest.raises(Failed, match="no recipe that it ships uses it at size smoke"):
            promises["smoke recipe"](trial)


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
