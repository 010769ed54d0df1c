"""Half-precision weights under fp32 adapters: what trains keeps its precision, from injection to file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.testing.runs import run_tiny, tiny_recipe
from graftwork.train.stream import Stream
from safetensors.torch import load_file


@pytest.mark.parametrize("policy", ["shared", "stacked", "separate"])
@pytest.mark.parametrize("again", [False, True])
def test_adapters_on_half_precision_weights_are_fp32(
    policy: str, again: bool, checkpoint: Path, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``again``: the second task's adapters are read from the stage of the first."""
    seen: list[dict[str, torch.dtype]] = []
    learn = Stream._learn

    def watched(self: Any, task: Any) -> None:
        if again and task.index == 1 and len(seen) == 1:
            raise KeyboardInterrupt
        learn(self, task)
        seen.append({name: parameter.dtype for name, parameter in self.stack.model.named_parameters()})

    monkeypatch.setattr(Stream, "_learn", watched)
    recipe = tiny_recipe(
        checkpoint,
        stream,
        adapter={"peft_type": "LORA", "r": 2, "target_modules": "all-linear", "policy": policy},
        data_options={"order": ["fruit", "metal"]},
        train={"max_steps": 2},
    )
    recipe.jobs[0].job.model.dtype = "bfloat16"
    if again:
        with pytest.raises(KeyboardInterrupt):
            run_tiny(recipe, tmp_path / "run")
        seen.append({})
    run_tiny(recipe, tmp_path / "run", resume=again)
    for dtypes in filter(None, seen):
        assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
        assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    for file in (tmp_path / "run/adapter").rglob("*.safetensors"):
        for name, value in load_file(file).items():
            assert value.dtype == torch.float32
            # Had a step been taken in half precision, nothing would be left below its last bit.
            assert not torch.equal(value, value.bfloat16().float()), name
