"""Spearman's correlation against values worked out by hand, and the report over runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from graftwork_bdq.correlate import main, ranks, spearman


def test_equal_values_share_a_rank() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]


def test_against_the_formula_without_ties() -> None:
    one, other = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 40.0, 30.0, 50.0]
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = (1, -1, 1, -1, 0).
    assert spearman(one, other) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman(one, [math.exp(x) for x in one]) == pytest.approx(1)
    assert spearman(one, [-x for x in one]) == pytest.approx(-1)
    assert math.isnan(spearman(one, [1.0] * 5))


def test_the_report_joins_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, errors in (("a", [0.1, 0.2, 0.3]), ("b", [0.6, 0.5, 0.4])):
        layers = [
            {"error": error, "weights_flatness": [0.5, index / 10], "inputs_flatness": None}
            for index, error in enumerate(errors)
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "transform.json").write_text(json.dumps({"layers": layers}))
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in lines[1:]] == [["3", "+1.000"], ["3", "-1.000"], ["6", "+0.000"]]


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no transform.json" in capsys.readouterr().err
