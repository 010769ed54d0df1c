"""PaRSP as a method of PEFT: saving, loading, several adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from graftwork import UserError
from graftwork.testing.adapters import (
    assert_names_its_plugin,
    assert_registered_once,
    assert_round_trip,
    assert_transformers_loads,
    assert_unloads,
)
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork_parsp import ParspConfig, ParspModel, begin_region, find_mlps, fold
from graftwork_parsp.model import active_adapter, layers_of
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

KINDS = ["llama", "mistral", "qwen2", "gpt2"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [{}, {"form": "lora", "rank": 3, "down": "columns"}], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_save_and_load_is_bit_exact(adapt, tmp_path: Path, kind, fields, dtype) -> None:
    config = assert_round_trip(adapt(kind, dtype=dtype, **fields), tmp_path, kind=kind, dtype=dtype)
    assert (config["peft_type"], config["graftwork_plugin"]) == ("PARSP", "parsp")


def test_a_folded_adapter_is_rows_and_nothing_else(adapt, batch, tmp_path: Path) -> None:
    adapted = adapt(form="lora", rank=2)
    fold(adapted)
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    sizes = {key.rpartition(".")[2]: value.numel() for key, value in saved.items() if value.numel() > 1}
    assert set(sizes) == {"parsp_rows", "parsp_delta"}
    assert saved[next(k for k in saved if k.endswith("parsp_rows"))].dtype == torch.int32
    assert saved[next(k for k in saved if k.endswith("parsp_delta"))].dtype == torch.float32
    again = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.equal(again(**batch).logits, adapted(**batch).logits)


def test_a_loaded_adapter_trains_on_as_the_original_would(adapt, batch, tmp_path: Path) -> None:
    adapted = adapt()
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True).eval()
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == {
        n for n, p in again.named_parameters() if p.requires_grad
    }
    results = []
    for model in (adapted, again):
        losses = []
        for task in range(2):
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            for _ in range(2):
                optimizer.zero_grad()
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            fold(model)
            begin_region(model, {mlp.name: torch.arange(5) + task for mlp in find_mlps(model)})
        results.append(losses)
    assert results[0] == results[1]
    assert len(set(results[0])) == 4


def test_loading_over_another_region_takes_its_shapes(adapt, region, batch, tmp_path: Path) -> None:
    """What a Trainer does when it resumes: the adapter is there, with other sizes."""
    adapted = adapt()
    expected = adapted(**batch).logits
    adapted.save_pretrained(tmp_path)
    region(adapted, 8, 3)
    assert not torch.equal(adapted(**batch).logits, expected)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    adapted.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(adapted(**batch).logits, expected)
    adapted.save_pretrained(tmp_path / "again")
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, tmp_path / "again")]
    assert configs[0] == configs[1]
    assert set(map(tuple, configs[0]["sizes"].values())) <= {(r, 9, 5) for r in range(12, 22)}
    # The optimizer that holds them would go on with them.
    assert all(
        a is b for a, b in zip(parameters, [p for p in adapted.parameters() if p.requires_grad], strict=True)
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_loads_the_adapter(adapt, tmp_path: Path, kind) -> None:
    assert_transformers_loads(adapt(kind), tmp_path, kind=kind)


def test_a_merged_checkpoint_needs_no_plugin(adapt, tmp_path: Path) -> None:
    """Plain transformers gives the same greedy text."""
    adapted = adapt()
    fold(adapted)
    tokenizer = tiny_tokenizer()
    prompt = tokenizer("say:", return_tensors="pt")
    expected = adapted.generate(**prompt, max_new_tokens=12, do_sample=False)
    adapted.merge_and_unload().save_pretrained(tmp_path)
    assert "parsp" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.generate(**prompt, max_new_tokens=12, do_sample=False), expected)
    plain = tiny_model().generate(**prompt, max_new_tokens=12, do_sample=False)
    assert not torch.equal(plain, expected)


def test_several_adapters_on_one_model(adapt, learn, region, batch, tmp_path: Path) -> None:
    """Each answers as it does alone; together they add up; switching and deleting leave the others as they are."""
    alone = {}
    for name, seed in (("a", 11), ("b", 12)):
        model = adapt(learned=False, density=0.25 if name == "a" else 0.5)
        region(model, seed, 6 + seed)
        learn(model, seed)
        alone[name] = model(**batch).logits
        model.save_pretrained(tmp_path / name)
        changes = {key: layer.get_delta_weight("default") for key, layer in layers_of(model).items()}
        alone[name + "-changes"] = changes
    both = PeftModel.from_pretrained(tiny_model(), tmp_path / "a", adapter_name="a")
    both.load_adapter(tmp_path / "b", "b")
    both.eval()
    assert torch.equal(both(**batch).logits, alone["a"])
    both.set_adapter("b")
    assert torch.equal(both(**batch).logits, alone["b"])
    assert {n for n, p in both.named_parameters() if p.requires_grad} <= {
        n for n, _ in both.named_parameters() if n.endswith(".b")
    }
    both.base_model.set_adapter(["a", "b"])
    reference = tiny_model()
    for key in alone["a-changes"]:
        with torch.no_grad():
            reference.get_submodule(key).weight += alone["a-changes"][key] + alone["b-changes"][key]
    torch.testing.assert_close(both(**batch).logits, reference(**batch).logits, rtol=0, atol=1e-5)
    weights = {key: layer.get_base_layer().weight.clone() for key, layer in layers_of(both).items()}
    both.merge_adapter()
    torch.testing.assert_close(both(**batch).logits, reference(**batch).logits, rtol=0, atol=1e-5)
    both.unmerge_adapter()
    for key, layer in layers_of(both).items():
        assert torch.equal(layer.get_base_layer().weight, weights[key])
    both.delete_adapter("b")
    both.set_adapter("a")
    assert torch.equal(both(**batch).logits, alone["a"])
    assert not any(key.endswith(".b") for key in both.state_dict())
    assert active_adapter(both) == "a"


def test_unloading_gives_the_base_back(adapt) -> None:
    plain = assert_unloads(adapt())
    with pytest.raises(UserError, match="no active PaRSP adapter"):
        active_adapter(plain)


def test_an_adapter_without_its_plugin_names_the_plugin(
    adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_names_its_plugin(adapt(), tmp_path, monkeypatch)


def test_the_method_is_registered_once() -> None:
    assert_registered_once(ParspConfig(density=0.5), ParspModel)


def test_the_readme_s_loop_runs(batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, on a tiny model; the second task lies outside of what the first one's inputs span."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    losses = []

    def train(model: PeftModel, batches: list[dict[str, torch.Tensor]]) -> None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(**batches[0]).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    tasks = {"one": [batch], "two": [{key: value.flip(0) for key, value in batch.items()}]}
    names = {"base": tiny_model(), "tasks": tasks, "train": train}
    exec(code, names)
    assert losses[3] < losses[0]
    assert len(names["history"]) == 2
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    assert not torch.equal(merged(**batch).logits, tiny_model()(**batch).logits)
