"""PEFT's own OSF through a recipe's ``adapter:``: what trains, what is saved, resumption, reloading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.models import load_model
from graftwork.testing.models import tiny_model
from graftwork.testing.runs import run_tiny, tiny_recipe
from peft import PeftModel
from safetensors.torch import load_file

OSF = {"peft_type": "OSF", "effective_rank": 0.5, "target_modules": "all-linear"}


def recipe_of(checkpoint: Path, stream: Path, **changes: Any) -> Any:
    return tiny_recipe(checkpoint, stream, adapter=OSF, seed=1, evaluate={"cells": "final"}, **changes)


def test_two_tasks_resume_to_the_same_bits_and_reload(
    checkpoint: Path, stream: Path, resumes_exactly: Callable[..., Path], logged: Callable[..., Any]
) -> None:
    train = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = resumes_exactly(recipe_of(checkpoint, stream, train=train), None)
    config = json.loads((whole / "adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("OSF", str(checkpoint))
    assert len(logged(whole)) == 6
    first, second = (
        load_file(whole / f"stages/{name}/model/adapter_model.safetensors")
        for name in ("01-fruit", "02-metal")
    )
    # One adapter through both tasks; the second goes on where the first ended.
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[key], second[key]) for key in first)

    # What a user takes away is the base weights plus U S V of the trained part minus that of the start.
    ids = torch.arange(3, 60)[None]
    by_peft = PeftModel.from_pretrained(tiny_model(), whole / "adapter").eval()(ids).logits
    by_us = load_model(str(whole / "adapter")).eval()(ids).logits
    assert torch.equal(by_peft, by_us)
    reference = tiny_model(dtype=torch.float64)
    values = load_file(whole / "adapter/adapter_model.safetensors")
    changed = 0
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            key = f"base_model.model.{name.removesuffix('.weight')}.osf_svd_params"
            if f"{key}.U_low" in values:
                u, s, v = (values[f"{key}.{part}"].double() for part in ("U_low", "S_low", "V_low"))
                left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
                kept = min(weight.shape) // 2
                assert s.shape == (min(weight.shape) - kept,)
                weight.copy_((left[:, :kept] * sizes[:kept]) @ right[:kept] + (u * s) @ v)
                changed += 1
    assert changed == 14
    torch.testing.assert_close(by_us.double(), reference(ids).logits, rtol=1e-3, atol=1e-4)
    assert (by_us - tiny_model()(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("plugin", ["ewc", "lwf"])
def test_plugins_combine_with_it(
    plugin: str, checkpoint: Path, stream: Path, tmp_path: Path, logged: Callable[..., Any]
) -> None:
    run_tiny(recipe_of(checkpoint, stream, plugins={plugin: {}}, train={"max_steps": 3}), tmp_path / "run")
    values = [log.get(f"loss/{plugin}") for log in logged(tmp_path / "run")]
    assert values[:3] == [None] * 3
    assert min(values[4:]) > 0
