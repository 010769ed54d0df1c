"""The recipes that come with the package: the claim says what it should, and its small size runs on its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from graftwork.cli import cli
from graftwork.evaluate.benchmarks import benchmark_options
from graftwork.plugins import find
from graftwork.recipe import load
from graftwork.recipes import shipped
from graftwork_d3.benchmarks import BENCHMARKS

RECIPES = shipped(find("d3"))


@pytest.mark.parametrize("size", ["smoke", "small", "paper"])
def test_options_of_every_step_are_known(size: str) -> None:
    for spec in load(RECIPES["claim"], size=size).jobs:
        section = spec.job.benchmark or {}
        benchmark_options(BENCHMARKS[section["name"].removeprefix("d3:")], section)


def test_layers_are_chosen_on_other_questions_than_those_that_are_judged() -> None:
    for size in ("smoke", "small", "paper"):
        spans = {"d3:tune": set(), "d3:fidelity": set()}
        for spec in load(RECIPES["claim"], size=size).jobs:
            section = spec.job.benchmark or {}
            options = benchmark_options(BENCHMARKS[section["name"].removeprefix("d3:")], section)
            if options.data is not None:
                spans[section["name"]] |= set(range(options.offset, options.offset + options.limit))
        assert spans["d3:tune"]
        assert not spans["d3:tune"] & spans["d3:fidelity"]


def test_the_smoke_size_needs_nothing_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFTWORK_DATA", raising=False)
    output = tmp_path / "run"
    outcome = CliRunner().invoke(cli, ["run", "d3:claim", "--size", "smoke", "--output", str(output)])
    assert outcome.exit_code == 0, outcome.output
    jobs = {job["name"]: job for job in json.loads((output / "results.json").read_text())["jobs"]}
    assert list(jobs) == ["tune-mild", "mild", "strong"]
    # The second step reads the answers of the first and the same schedule.
    assert jobs["mild"]["metrics"] == jobs["strong"]["metrics"]
    assert "KL over positions" in (output / "report.html").read_text()


def test_tuning_from_the_command_line(tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = ["run", "d3:tune", "--size", "smoke", "--output", str(output)]
    assert CliRunner().invoke(cli, words).exit_code == 0
    (config,) = output.rglob("d3.json")
    used = ["--plugin", "d3", "--set", f"plugins.d3.config={config}"]
    asked = ["--set", "benchmark.max_new_tokens=3", "--set", "benchmark.data=tiny"]
    outcome = CliRunner().invoke(
        cli, ["evaluate", "--model", "tiny-random", "--benchmark", "qa", *used, *asked]
    )
    assert outcome.exit_code == 0, outcome.output
