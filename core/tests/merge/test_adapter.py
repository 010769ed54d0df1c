"""Experts that are LoRA adapters: equal to the model that PEFT merges them into, read by rows; others refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.models import load_model
from graftwork.testing.experts import merge_tiny, open_tiny, save_tiny, tensors_of, tiny_experts
from graftwork.testing.models import tiny_model
from merge_methods import Mean, Own, Trimmed
from peft import LoraConfig, get_peft_model

SETTINGS: list[dict[str, Any]] = [
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    {"target_modules": ["up_proj", "v_proj"], "alpha_pattern": {"up_proj": 3}, "rank_pattern": {"v_proj": 2}},
]


def adapter(base: Path, folder: Path, seed: int = 0, **settings: Any) -> tuple[str, Path]:
    """Save a random LoRA of ``base`` and the dense model that it makes; return the adapter and the model."""
    model = load_model(str(base))
    kind = {"r": 4, "lora_alpha": 8, **settings}
    wrapped = get_peft_model(model, LoraConfig(**kind))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    wrapped.save_pretrained(folder / "adapter")
    save_tiny(wrapped.merge_and_unload(), folder / "dense")
    return str(folder / "adapter"), folder / "dense"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equal_to_the_dense_merge(tmp_path: Path, settings: dict[str, Any]) -> None:
    base, _ = tiny_experts(tmp_path, [])
    ref, dense = adapter(base, tmp_path, **settings)
    merge_tiny(base, {"x": ref}, Own(), tmp_path / "out", expand="x")
    found, expected = tensors_of(tmp_path / "out/model"), tensors_of(dense)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-7)


def test_weights_that_lie_the_other_way_round(tmp_path: Path) -> None:
    base, _ = tiny_experts(tmp_path, [], kind="gpt2")
    ref, dense = adapter(base, tmp_path, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    merge_tiny(base, {"x": ref}, Mean(), tmp_path / "out")
    found, expected = tensors_of(tmp_path / "out/model"), tensors_of(dense)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-7)


def test_adapters_and_models_together_and_tiles(tmp_path: Path) -> None:
    base, refs = tiny_experts(tmp_path, ["a"], intermediate_size=200)
    refs["x"], _ = adapter(base, tmp_path, **SETTINGS[0])
    for rows in (None, 1, 7, 100):
        merge_tiny(base, refs, Trimmed(), tmp_path / f"out-{rows}", rows=rows)
    whole = tensors_of(tmp_path / "out-None/model")
    for rows in (1, 7, 100):
        for name, tensor in tensors_of(tmp_path / f"out-{rows}/model").items():
            assert torch.equal(tensor, whole[name])


def test_another_base_is_refused(tmp_path: Path) -> None:
    base, _ = tiny_experts(tmp_path, [])
    other = save_tiny(tiny_model(seed=5), tmp_path / "other")
    ref, _ = adapter(other, tmp_path, **SETTINGS[0])
    with pytest.raises(
        UserError, match=r"is an adapter of .*other', whose weights are not those of the base"
    ):
        open_tiny(base, {"x": ref})


def test_a_copy_of_the_base_is_the_base(tmp_path: Path) -> None:
    base, _ = tiny_experts(tmp_path, [])
    copy = save_tiny(load_model(str(base)), tmp_path / "copy")
    ref, _ = adapter(copy, tmp_path, **SETTINGS[0])
    assert open_tiny(base, {"x": ref}).notes == []


def test_a_base_that_is_gone_is_told(tmp_path: Path) -> None:
    base, _ = tiny_experts(tmp_path, [])
    ref, _ = adapter(base, tmp_path, **SETTINGS[0])
    config = Path(ref) / "adapter_config.json"
    gone = {**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "gone")}
    config.write_text(json.dumps(gone))
    assert "is not here to be compared" in open_tiny(base, {"x": ref}).notes[0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"use_dora": True}, "expert 'x' has use_dora"),
        ({"modules_to_save": ["lm_head"]}, "expert 'x' has modules_to_save"),
        ({"bias": "all"}, "expert 'x' has bias"),
    ],
    ids=str,
)
def test_what_is_no_product_of_two_matrices(tmp_path: Path, settings: dict[str, Any], sentence: str) -> None:
    base, _ = tiny_experts(tmp_path, [])
    ref, _ = adapter(base, tmp_path, target_modules=["q_proj"], **settings)
    with pytest.raises(UserError, match=sentence):
        open_tiny(base, {"x": ref})


def test_a_broken_config(tmp_path: Path) -> None:
    base, _ = tiny_experts(tmp_path, [])
    ref, _ = adapter(base, tmp_path, **SETTINGS[0])
    config = Path(ref) / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base)}))
    with pytest.raises(UserError, match=r"is not the config of an adapter: it needs .* lora_alpha"):
        open_tiny(base, {"x": ref})


def test_weights_that_the_base_lacks(tmp_path: Path) -> None:
    base, _ = tiny_experts(tmp_path, [])
    larger = save_tiny(tiny_model(num_hidden_layers=3), tmp_path / "larger")
    ref, _ = adapter(larger, tmp_path, **SETTINGS[0])
    with pytest.raises(UserError, match=r"the adapter's tensor 'base_model\.model\.model\.layers\.2\."):
        open_tiny(base, {"x": ref})
