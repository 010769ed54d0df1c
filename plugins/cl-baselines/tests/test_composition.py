"""The baselines together, on LoRA and on full weights, and the recipes that come with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graftwork import UserError
from graftwork.recipe import load
from graftwork.recipes import locate
from graftwork.testing.models import tiny_checkpoint
from graftwork.testing.runs import losses, run_tiny, tiny_recipe

LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
RECIPES = {"seq-lora": "shared", "inc-lora": "stacked", "per-task": "separate", "osf": "shared"}


@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "full"])
def test_replay_ewc_and_lwf_together(
    adapter: dict | None,
    checkpoint: Path,
    stream: Path,
    resumes_exactly: Callable[..., Path],
    logged: Callable,
) -> None:
    plugins = {"replay": {"share": 0.25}, "ewc": {"strength": 1}, "lwf": {}}
    train = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    recipe = tiny_recipe(
        checkpoint,
        stream,
        plugins=plugins,
        adapter=adapter,
        seed=1,
        train=train,
        evaluate={"cells": "final"},
    )
    whole = resumes_exactly(recipe, "ewc")
    last = logged(whole)[-1]
    assert last["loss/ewc"] > 0
    assert last["loss/lwf"] > 0


@pytest.mark.parametrize("method", ["o-lora", "n-lora", "inf-lora"])
def test_a_stack_with_replay_and_distillation(
    method: str, checkpoint: Path, stream: Path, tmp_path: Path, logged: Callable
) -> None:
    shared: dict[str, Any] = {"seed": 1, "train": {"max_steps": 3}, "evaluate": {"cells": "final"}}
    plugins = {method: {"rank": 2}}
    run_tiny(tiny_recipe(checkpoint, stream, plugins=plugins, **shared), tmp_path / "alone")
    both = {**plugins, "replay": {}, "lwf": {}}
    run_tiny(tiny_recipe(checkpoint, stream, plugins=both, **shared), tmp_path / "both")
    assert losses(tmp_path / "both")[:3] == losses(tmp_path / "alone")[:3]
    assert all(log["loss/lwf"] > 0 for log in logged(tmp_path / "both")[4:])


@pytest.mark.parametrize("method", ["replay", "mtl", "ewc", "lwf", "o-lora", "n-lora", "inf-lora"])
def test_encoder_decoders(method: str, stream: Path, tmp_path: Path, logged: Callable) -> None:
    own = method.endswith("lora")
    recipe = tiny_recipe(
        tiny_checkpoint(tmp_path / "t5", "t5"),
        stream,
        algorithm="seq2seq",
        plugins={method: {"rank": 2, "target_modules": ["q", "v"]} if own else {}},
        adapter=None if own else {**LORA, "target_modules": ["q", "v"]},
        train={"max_steps": 3},
        evaluate={"cells": "final"},
    )
    run_tiny(recipe, tmp_path / "run")
    logs = logged(tmp_path / "run")
    assert len(logs) == 6
    terms = {"ewc": "ewc", "lwf": "lwf", "o-lora": "orth", "n-lora": "sparse"}
    if method in terms:
        assert all(log[f"loss/{terms[method]}"] > 0 for log in logs[4:])


def test_ewc_and_a_stack_do_not_fit(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        checkpoint, stream, plugins={"n-lora": {"rank": 2}, "ewc": {}}, train={"max_steps": 1}
    )
    with pytest.raises(UserError, match="freezes those"):
        run_tiny(recipe, tmp_path / "run")


def test_two_stacks_do_not_fit(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(checkpoint, stream, plugins={"n-lora": {}, "inf-lora": {}})
    with pytest.raises(UserError, match="'n-lora' and 'inf-lora' cannot be combined"):
        run_tiny(recipe, tmp_path / "run")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_at_the_size_smoke(name: str, tmp_path: Path) -> None:
    recipe = load(
        locate(f"cl-baselines:{name}"), size="smoke", sets=["train.max_steps=1", "evaluate.cells=final"]
    )
    assert recipe.arms == [name]
    adapter = recipe.jobs[0].job.adapter
    assert (adapter or {}).get("policy", "shared") == RECIPES[name]
    result = run_tiny(recipe, tmp_path / "run")
    assert result["order"] == ["colour", "fruit", "metal"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_three_seeds_and_two_orders_at_the_size_small(name: str) -> None:
    recipe = load(locate(f"cl-baselines:{name}"), size="small")
    assert len(recipe.jobs) == 3 * 2
