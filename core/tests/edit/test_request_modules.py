"""Requests that a plugin's package makes or reads: ``<module>:<function>[:FILE]``, and only plugins are called."""

from __future__ import annotations

import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from graftwork import UserError
from graftwork.edit import layouts
from graftwork.edit.layouts import read_requests
from graftwork.edit.requests import Request


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a plugin whose package has a function that makes requests."""
    seen: list[Any] = []

    def make(path: Path | None) -> list[Request]:
        seen.append(path)
        return [Request(str(n), "{} is", f"subject {n}", "here") for n in range(4)]

    package, data = types.ModuleType("some_plugin"), types.ModuleType("some_plugin.data")
    data.__dict__.update(make=make, seen=seen, number=3)
    monkeypatch.setitem(sys.modules, "some_plugin", package)
    monkeypatch.setitem(sys.modules, "some_plugin.data", data)
    point = EntryPoint("some", "some_plugin.plugin:Some", "graftwork.plugins")
    monkeypatch.setattr(layouts.importlib.metadata, "entry_points", lambda **_: [point])


def test_its_function_gets_the_path_and_gives_the_requests() -> None:
    found = read_requests("some_plugin.data:make", limit=2, offset=1)
    assert [one.id for one in found] == ["1", "2"]
    read_requests("some_plugin.data:make:folder/file.json")
    assert sys.modules["some_plugin.data"].seen == [None, Path("folder/file.json")]


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("os.path:exists:x", "'os' is no package of an installed plugin"),
        ("some_plugin.data:none", "has no function 'none'"),
        ("some_plugin.data:number", "has no function 'number'"),
        ("some_plugin.missing:make", "cannot be imported"),
    ],
)
def test_what_is_no_function_of_a_plugin_is_told(ref: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_requests(ref)


def test_an_offset_beyond_the_end_is_told() -> None:
    with pytest.raises(UserError, match="has 4 requests, none of them after the first 9"):
        read_requests("some_plugin.data:make", offset=9)
