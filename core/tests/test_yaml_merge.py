"""Merge keys in recipes: ``<<: *name`` takes what stands there, and what stands beside it wins."""

from __future__ import annotations

import pytest
from graftwork.errors import UserError
from graftwork.yaml_lines import parse


def test_keys_beside_it_win_wherever_it_stands() -> None:
    text = "a: &a {x: 1, y: {z: 2}}\nb: {<<: *a, x: 3}\nc: {x: 3, <<: *a}\n"
    data = parse(text, "r.yaml").data
    assert data["b"] == data["c"] == {"x": 3, "y": {"z": 2}}
    assert data["a"] == {"x": 1, "y": {"z": 2}}
    data["b"]["y"]["z"] = 4
    assert data["a"]["y"]["z"] == 2


def test_a_key_has_the_line_where_it_was_written_last() -> None:
    document = parse("a: &a\n  x: 1\nb:\n  <<: *a\n  y: 2\n", "r.yaml")
    assert document.where(("b", "y")) == "r.yaml:5"
    assert document.where(("b", "x")) == "r.yaml:2"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [1]\nb: {<<: *a}\n", r"r.yaml:2: '<<' takes one mapping"),
        ("a: &a {x: 1}\nb: {<<: *a, <<: *a}\n", "key '<<' stands here twice"),
        ("a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}\n", "key 'y' stands here twice"),
    ],
)
def test_mistakes_are_told(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse(text, "r.yaml")
