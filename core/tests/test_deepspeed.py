"""What is refused about ``train.deepspeed`` before anything is loaded."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from graftwork import UserError
from graftwork.testing.packages import install_plugin
from graftwork.testing.runs import run_tiny, tiny_recipe
from graftwork.train.deepspeed import read_config, zero_stage

CODE = """
from graftwork import LossTerm, hookimpl

class Reads:
    def __init__(self, options): ...
    @hookimpl
    def loss_terms(self, run, model):
        return [LossTerm("size", lambda model, batch: sum(p.square().sum() for p in model.parameters()))]
"""


def test_the_stage_is_read_from_a_file_or_a_mapping(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 2}}
    path = tmp_path / "zero2.json"
    path.write_text(json.dumps(config))
    assert read_config({"deepspeed": str(path)}) == read_config({"deepspeed": config}) == config
    assert zero_stage({"deepspeed": str(path)}) == 2
    assert zero_stage({"deepspeed": {}}) == zero_stage({}) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "cannot be read: No such file"), ("{", "is not valid JSON"), ("[]", "holds no JSON object")],
)
def test_a_bad_file_is_told(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_config({"deepspeed": str(path)})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sharded_weights_are_refused_where_a_plugin_works_on_them(
    checkpoint: Path, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    install_plugin(site, "reads", "readsweights:Reads", CODE)
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    train = {"deepspeed": {"zero_optimization": {"stage": 3}}}
    recipe = tiny_recipe(checkpoint, stream, train=train, plugins={"reads": {}})
    with pytest.raises(UserError, match=r"stage 3.*plugin 'reads' works on them.*\(hook loss_terms\)"):
        run_tiny(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
