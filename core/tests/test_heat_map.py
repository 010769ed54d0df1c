"""A heat map in the report: every finite cell is drawn, gaps stay gaps, names stay text."""

from __future__ import annotations

import dataclasses
import math
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from graftwork import HeatMap
from graftwork.report import heat
from graftwork.report.html import render


def chart(**changes: Any) -> dict[str, Any]:
    given = HeatMap(
        "Where",
        "A caption.",
        "layer",
        "share",
        ["0", "1", "2"],
        {"attn": [0.1, 0.2, None], "mlp": [0.3, 0.4, 0.5]},
    )
    return {**dataclasses.asdict(given), **changes}


def texts(svg: str) -> list[str]:
    return [
        "".join(node.itertext()).strip()
        for node in ElementTree.fromstring(svg).iter()
        if node.tag.endswith("text")
    ]


def test_cells_say_their_numbers_and_a_missing_one_says_nothing() -> None:
    found = texts(heat.heat_map(chart()))
    cells = [text for text in found if text in ("0.1", "0.2", "0.3", "0.4", "0.5")]
    assert {"attn", "mlp", "layer", "share", "0.2", "0.3"} <= set(found)
    assert "nan" not in found
    # The colour bar repeats some of the numbers, so there are at least the five cells.
    assert len(cells) >= 5


def test_many_columns_are_named_sparsely() -> None:
    columns = [f"c{k}" for k in range(75)]
    found = texts(heat.heat_map(chart(columns=columns, rows={"row": [float(k) for k in range(75)]})))
    assert [text for text in found if text.startswith("c")] == columns[::3]


@pytest.mark.parametrize(
    "changes",
    [{"rows": {}}, {"columns": []}, {"rows": {"a": [None, math.nan, math.inf]}}, {"rows": {"a": [1.0]}}],
    ids=["no rows", "no columns", "nothing finite", "another length"],
)
def test_what_cannot_be_drawn_is_left_out(changes: dict[str, Any]) -> None:
    assert heat.heat_map(chart(**changes)) == ""


def test_the_page_has_it_below_the_table() -> None:
    job = {
        "name": "arm",
        "variant": "",
        "benchmark": "some:where",
        "metrics": {"entropy": 0.5},
        "words": {"entropy": "of the map"},
        "lines": [chart()],
        "eval_seconds": 1.0,
    }
    page = render({"title": "t", "jobs": [job]})
    assert "<h4>Where</h4>" in page
    assert "A caption." in page
