"""Which runs may divide a model among processes: what is declared, what is refused before anything is loaded."""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import PluginError, UserError, hookimpl
from graftwork.plugins import Plugins
from graftwork.testing.packages import install_plugin
from graftwork.testing.runs import run_tiny, tiny_recipe
from graftwork.train import sharding
from graftwork.train.plan import dry_run
from graftwork.train.sharding import KINDS, check, fsdp_config, gather, kind_of

ZERO = {stage: {"deepspeed": {"zero_optimization": {"stage": stage}}} for stage in (0, 1, 2, 3)}
ASKED = {"zero2": ZERO[2], "zero3": ZERO[3], "fsdp2": {"fsdp": True}}


class Trains:
    """Takes part in training and declares nothing."""

    @hookimpl
    def task_end(self, run: Any, task: Any, trainer: Any) -> None: ...


class Writes:
    """Takes part in generation only."""

    @hookimpl
    def logits_processors(self, run: Any, model: Any) -> None: ...


def declaring(*kinds: str) -> Any:
    return type("Declares", (Trains,), {"sharding": frozenset(kinds)})()


def said(train: dict[str, Any], plugin: Any, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        check(train, Plugins({"mine": plugin}), environ or {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_asked_for() -> None:
    assert kind_of({}) is None
    assert kind_of({"fsdp": False, "deepspeed": None}) is None
    # Without stages DeepSpeed still keeps the gradients to itself.
    assert [kind_of(train) for train in ZERO.values()] == ["zero2", "zero2", "zero2", "zero3"]
    assert kind_of({"fsdp": "full_shard auto_wrap"}) == "fsdp2"
    assert kind_of({"fsdp": True, "fsdp_config": {"fsdp_version": 2}}) == "fsdp2"


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"fsdp": True, **ZERO[2]}, "train.fsdp and train.deepspeed both divide"),
        (
            {"fsdp": True, "fsdp_config": {"version": 1}},
            r"train.fsdp_config.version = 1: .*FSDP2; set it to 2",
        ),
        ({"fsdp": True, "fsdp_config": "nowhere.json"}, "'nowhere.json', which cannot be read: No such file"),
    ],
)
def test_what_cannot_be_asked_for(train: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        kind_of(train)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [("{", "is not valid JSON"), ("[]", "holds no JSON object")])
def test_a_bad_file_is_told(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "fsdp.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        fsdp_config({"fsdp_config": str(path)})
    path.write_text(json.dumps({"fsdp_cpu_offload": True, "version": 2}))
    assert fsdp_config({"fsdp_config": str(path)}) == {"cpu_offload": True, "version": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_a_plugin_trains_sharded_only_where_it_declares_it(kind: str) -> None:
    train = ASKED[kind]
    told = said(train, Trains())
    assert told == (
        f"plugin 'mine' does not declare that it can be trained under {KINDS[kind]}; train data-parallel, without "
        f"it, or leave the plugin out"
    )
    others = [other for other in KINDS if other != kind]
    assert f"or with {KINDS[others[0]]}, or leave" in said(train, declaring(others[0]))
    check(train, Plugins({"mine": declaring(kind)}), {})
    check(train, Plugins({"mine": Writes()}), {})
    check({}, Plugins({"mine": Trains()}), {})


@pytest.mark.parametrize("wrong", ["zero3", {"zero4"}, True])
def test_a_declaration_of_something_else_is_the_plugin_s_mistake(wrong: Any) -> None:
    plugin = type("Declares", (Trains,), {"sharding": wrong})()
    with pytest.raises(PluginError, match=r"plugin 'mine' failed in hook 'sharding': .* zero2, zero3"):
        check(ZERO[3], Plugins({"mine": plugin}), {})


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_what_only_the_launcher_knows_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the launcher's own configuration turns on" in said({}, Trains(), {variable: "true"})
    check({}, Plugins({"mine": Trains()}), {variable: "false"})
    # accelerate leaves it behind after a job, and the next one need not be sharded.
    monkeypatch.setenv(variable, "true")
    sharding.let_go()
    assert variable not in os.environ


CODE = """
from graftwork import LossTerm, hookimpl

class Reads:
    def __init__(self, options): ...
    @hookimpl
    def loss_terms(self, run, model):
        return [LossTerm("size", lambda model, batch: sum(p.square().sum() for p in model.parameters()))]
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_refused_before_anything_is_loaded(
    kind: str, checkpoint: Path, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    install_plugin(site, "reads", "readsweights:Reads", CODE)
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    recipe = tiny_recipe(checkpoint, stream, train=ASKED[kind], plugins={"reads": {}})
    with pytest.raises(UserError, match="plugin 'reads' does not declare"):
        run_tiny(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fsdp_in_one_process_is_refused(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(checkpoint, stream, train={"fsdp": True})
    with pytest.raises(UserError, match=r"train.fsdp divides the model among processes, and this is one"):
        run_tiny(recipe, tmp_path / "run")
    assert "ACCELERATE_USE_FSDP" not in os.environ


def test_activations_are_computed_again_by_one_of_both(
    checkpoint: Path, stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train: dict[str, Any] = {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}
    with pytest.raises(
        UserError, match=r"both compute activations again; set train.gradient_checkpointing: false"
    ):
        run_tiny(tiny_recipe(checkpoint, stream, train=train), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    said = []
    for changes in (
        {**train, "gradient_checkpointing": False},
        {"fsdp": True},
        {"gradient_checkpointing": False},
    ):
        dry_run(tiny_recipe(checkpoint, stream, train=changes).jobs[0], gpus=2)
        said += re.findall(r"activations +at most ([\d.]+)", capsys.readouterr().out)
    assert said[0] == said[1]
    assert float(said[0]) < float(said[2])


def test_gathering_takes_over_values_buffers_and_what_trains() -> None:
    """Of ordinary tensors; sharded ones are gathered in the tests with two processes."""
    source, target = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    with torch.no_grad():
        source.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        source.running_mean.copy_(torch.tensor([4.0, 5.0, 6.0]))  # pyright: ignore[reportOptionalMemberAccess]
    source.bias.requires_grad_(False)
    gather(source, target)
    assert target.weight.tolist() == [1, 2, 3]
    assert target.running_mean.tolist() == [4, 5, 6]  # pyright: ignore[reportOptionalMemberAccess]
    assert [p.requires_grad for p in target.parameters()] == [True, False]
