"""Every pair of decoding plugins, and every decoding plugin with every kind of adapter: together or refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.generate import Decoding, Prompt, decode
from graftwork.models import load_model, load_tokenizer
from graftwork.plugins import Plugins
from graftwork.recipe import Job
from graftwork.run import Run
from graftwork.testing.runs import run_tiny, tiny_recipe

PROMPTS = [
    Prompt("The sky is green. What colour is the sky?", "What colour is the sky?"),
    Prompt("Rome lies in France. Where is Rome?", "Where is Rome?"),
]
COMBINERS: dict[str, dict[str, Any]] = {
    "coiecd": {},
    "cad": {},
    # Two streams of a random model hardly differ, so its own weight would be about 0.
    "adacad": {"floor": 0.69},
    "interpolation": {},
    "prior": {},
    "contrastive-decoding": {"amateur": "tiny-random"},
}
OTHERS: dict[str, dict[str, Any]] = {
    # Strong settings: a random model's tokens tell little. Both streams, as "prior" reads the second alone.
    "cale": {"layer": 1, "strength": 8.0, "streams": "both"},
    "d3": {"alpha": 0.5, "flex_start": 1, "tail": 1, "minimum": 2},
    # The embeddings: layers between them and the last are left out by d3, which refuses that they are read.
    "dola": {"layers": [0]},
}
METHODS = COMBINERS | OTHERS
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}},
    "sparta": {"plugins": {"sparta": {"block_layers": 1, "rank_specific": 4, "components": 2}}},
    "parsp": {"plugins": {"parsp": {"density": 0.25}}},
}


def answers(model: Any, names: list[str], **settings: Any) -> list[list[int]]:
    plugins = {name: {**METHODS[name], **settings.get(name, {})} for name in names}
    job = Job.model_validate(
        {"model": {"ref": "tiny-random"}, "data": {"source": "none"}, "plugins": plugins}
    )
    run = Run(Path(), job, Plugins.from_options(plugins))
    run.plugins.check(run)
    torch.manual_seed(0)
    return decode(
        model,
        PROMPTS,
        tokenizer=load_tokenizer("tiny-random"),
        decoding=Decoding.from_plugins(run, model),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=True,
    )


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("tiny-random")


@pytest.mark.parametrize("pair", itertools.combinations(METHODS, 2), ids="+".join)
def test_every_pair_of_methods_decodes_or_is_refused(model: Any, pair: tuple[str, str]) -> None:
    if all(name in COMBINERS for name in pair):
        with pytest.raises(UserError, match=f"plugins '{pair[0]}' and '{pair[1]}' cannot be combined"):
            answers(model, list(pair))
        return
    if "dola" in pair and pair[0] in COMBINERS:
        with pytest.raises(UserError, match=f"'dola' contrasts layers and '{pair[0]}' prompts"):
            answers(model, list(pair))
        return
    together = answers(model, list(pair))
    assert [len(row) for row in together] == [12, 12]
    # Each has its part in it, or the flag of one would be an empty word.
    assert all(together != answers(model, [name]) for name in pair)
    assert together == answers(model, list(pair))


def test_methods_that_touch_the_same_layer_are_refused(model: Any) -> None:
    with pytest.raises(UserError, match=r"'cale' .* and 'd3' leaves out .*: both touch layer 1"):
        answers(model, ["cale", "d3"], cale={"layer": 2})


def test_a_layer_that_is_read_cannot_be_left_out(model: Any) -> None:
    with pytest.raises(
        UserError, match=r"'d3' leaves out layers 1 to 2 and 'dola' reads .*: both touch layer 1"
    ):
        answers(model, ["d3", "dola"], dola={"layers": "high"})


def test_nothing_is_left_behind(model: Any) -> None:
    before = answers(model, [])
    for name in METHODS:
        answers(model, [name])
    assert answers(model, []) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.fixture(scope="module", params=ADAPTERS)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    recipe = tiny_recipe("tiny-random", "tiny", **ADAPTERS[request.param], evaluate={"cells": "final"})
    run_tiny(recipe, folder)
    return load_model(str(folder))


def test_every_method_works_with_an_adapter(adapted: Any, model: Any) -> None:
    for name in METHODS:
        rows = answers(adapted, [name])
        assert [len(row) for row in rows] == [12, 12], name
    # The adapter has its part in it, too.
    assert answers(adapted, ["coiecd"]) != answers(model, ["coiecd"])


@pytest.mark.parametrize("names", [["coiecd", "d3"], ["coiecd", "cale"], ["d3", "cale"]], ids="+".join)
def test_two_methods_and_an_adapter(adapted: Any, names: list[str]) -> None:
    assert [len(row) for row in answers(adapted, names)] == [12, 12]


NEUTRAL: dict[str, dict[str, Any]] = {
    "coiecd": {"alpha": 1.0, "ratio": 1.0},
    "cad": {"alpha": 0.0},
    "cale": {"layer": 2, "strength": 1.0},
    "d3": {"alpha": 1.0},
    "interpolation": {"weight": 1.0},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_settings_are_plain_generate(adapted: Any, name: str) -> None:
    assert answers(adapted, [name], **{name: NEUTRAL[name]}) == answers(adapted, [])


def test_a_task_is_scored_with_a_method_that_needs_no_context(
    trainer: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["evaluate", "--model", "tiny-random", "--data", "tiny", "--set", "evaluate.max_new_tokens=2"]
    assert trainer(*words, "--plugin", "d3", "--set", "plugins.d3.alpha=0.9").code == 0
    refused = trainer(*words, "--plugin", "coiecd")
    assert refused.code == 2
    assert "context" in refused.err
