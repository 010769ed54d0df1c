"""Hooks that change what a stream trains on, and that put a method's own charts into the report."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from graftwork import PluginError
from graftwork.recipes import locate
from graftwork.testing.packages import install_plugin
from graftwork.testing.runs import run_tiny, tiny_recipe

CODE = """
import dataclasses
from graftwork import AreaChart, hookimpl

class Halves:
    def __init__(self, options): ...
    @hookimpl
    def training_data(self, run, task, dataset):
        return dataset.select(range(len(dataset) // 2))

class Joint:
    def __init__(self, options): ...
    @hookimpl
    def task_stream(self, run, tasks):
        return [dataclasses.replace(task, train=tasks[-1].train) for task in tasks]

class Shortened:
    def __init__(self, options): ...
    @hookimpl
    def task_stream(self, run, tasks):
        return tasks[:1]

class Looks:
    def __init__(self, options):
        self.seen = []
    @hookimpl
    def training_data(self, run, task, dataset):
        self.seen.append(len(dataset))
    @hookimpl
    def task_begin(self, run, task, trainer):
        run.events.write("looked", task=task.name, given=self.seen[-1], trained=len(trainer.train_dataset),
                         first=task.train[0]["prompt"])
    @hookimpl
    def charts(self, run):
        return [AreaChart("Used", "Share used.", ["0", "1"], {"fruit": [0.1, 0.2], "metal": [0.3, 0.0]})]
"""
PLUGINS = {"halves": "Halves", "joint": "Joint", "shortened": "Shortened", "looks": "Looks"}
ADAPTER = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Four plugins of one package, found like any other."""
    folder = tmp_path / "site"
    folder.mkdir()
    for name, target in PLUGINS.items():
        install_plugin(folder, name, f"streamhooks:{target}", CODE, package=f"graftwork-hooks-{name}")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    yield folder
    importlib.invalidate_caches()


@pytest.fixture
def run(site: Path, checkpoint: Path, stream: Path, tmp_path: Path) -> Callable[..., tuple[dict, list[dict]]]:
    def call(*plugins: str) -> tuple[dict, list[dict]]:
        recipe = tiny_recipe(
            checkpoint,
            {"source": str(stream), "order": ["fruit", "metal"]},
            adapter=ADAPTER,
            plugins={name: {} for name in plugins},
            train={"max_steps": 1},
            evaluate={"cells": "final", "max_new_tokens": 1},
        )
        result = run_tiny(recipe, tmp_path / "run")
        lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        return result, [event for event in map(json.loads, lines) if event["event"] == "looked"]

    return call


def test_training_data_goes_from_plugin_to_plugin(run: Callable[..., tuple[dict, list[dict]]]) -> None:
    """A plugin sees what the one before it returned; one that returns nothing changes nothing."""
    _, events = run("halves", "looks")
    assert [(event["given"], event["trained"]) for event in events] == [(16, 16), (16, 16)]


def test_the_order_of_plugins_is_the_order_of_their_data(run: Callable[..., tuple[dict, list[dict]]]) -> None:
    _, events = run("looks", "halves")
    assert [(event["given"], event["trained"]) for event in events] == [(32, 16), (32, 16)]


def test_a_plugin_may_see_all_tasks_at_once(run: Callable[..., tuple[dict, list[dict]]]) -> None:
    result, events = run("joint", "looks")
    assert result["order"] == ["fruit", "metal"]
    assert events[0]["first"] == events[1]["first"]
    assert "Which metal?" in events[0]["first"]


def test_a_stream_of_other_tasks_is_the_plugins_fault(run: Callable[..., tuple[dict, list[dict]]]) -> None:
    with pytest.raises(PluginError, match="plugin 'shortened' failed in hook 'task_stream'"):
        run("shortened")


def test_charts_are_part_of_the_result(run: Callable[..., tuple[dict, list[dict]]]) -> None:
    result, _ = run("looks")
    (chart,) = result["charts"]
    assert chart["title"] == "Used"
    assert chart["parts"] == {"fruit": [0.1, 0.2], "metal": [0.3, 0.0]}
    assert chart["rest"] == "free"


def test_a_recipe_is_found_by_its_package_too(site: Path) -> None:
    (site / "streamhooks_pack/recipes").mkdir(parents=True)
    (site / "streamhooks_pack/__init__.py").write_text("")
    (site / "streamhooks_pack/recipes/plain.yaml").write_text("title: plain\n")
    install_plugin(site, "one", "streamhooks_pack:One", package="graftwork-pack")
    importlib.invalidate_caches()
    found = locate("pack:plain")
    assert found.read_text() == "title: plain\n"
    assert locate("one:plain") == found


def test_an_area_chart_is_data_alone() -> None:
    from graftwork import AreaChart

    chart = AreaChart("t", "c", ["0"], {"a": [0.5]}, rest="left")
    assert json.loads(json.dumps(dataclasses.asdict(chart)))["rest"] == "left"
