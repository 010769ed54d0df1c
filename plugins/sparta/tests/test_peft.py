"""SpaRTA as a method of PEFT: saving, loading, several adapters, merging, export."""

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
from graftwork.testing.models import tiny_model
from graftwork_sparta import SpartaConfig, export_branch, freeze_new, gate_values, grow, merge_static
from graftwork_sparta.layer import SpartaLinear
from graftwork_sparta.model import ROUTER, SpartaModel, active_adapter, layers_of, routers_of
from peft import PeftModel

KINDS = ["llama", "mistral", "qwen2", "gpt2"]
ATTENTION = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}


# ---------------------------------------------------------------- save and load


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ["prompt", "lineage", "off"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_save_and_load_is_bit_exact(adapt, scramble, tmp_path: Path, kind, router, dtype) -> None:
    adapted = adapt(kind, dtype=dtype, router=router, specific="per_task", dropout=0.1)
    grow(adapted, torch.Generator().manual_seed(1))
    scramble(adapted)
    config = assert_round_trip(adapted, tmp_path, kind=kind, dtype=dtype)
    assert (config["peft_type"], config["graftwork_plugin"], config["tasks"]) == ("SPARTA", "sparta", 2)


def test_a_loaded_adapter_trains_on_as_the_original_would(adapt, batch, tmp_path: Path) -> None:
    adapted = adapt(specific="per_task")
    grow(adapted, torch.Generator().manual_seed(1))
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True).eval()
    trains = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (adapted, again)]
    assert trains[0] == trains[1]
    results = []
    for model in (adapted, again):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for step in range(3):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step == 1:
                grow(model, torch.Generator().manual_seed(2))
                optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        results.append(losses)
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_loads_the_adapter(adapt, scramble, tmp_path: Path, kind) -> None:
    adapted = adapt(kind)
    grow(adapted, torch.Generator().manual_seed(1))
    scramble(adapted)
    assert_transformers_loads(adapted, tmp_path, kind=kind)


def test_an_adapter_without_its_plugin_names_the_plugin(
    adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_names_its_plugin(adapt(), tmp_path, monkeypatch)


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_means_every_linear_layer_of_the_decoder(adapt, kind) -> None:
    per_layer = 4 if kind == "gpt2" else 7
    adapted = adapt(kind)
    assert len(layers_of(adapted)) == 2 * per_layer
    assert not isinstance(adapted.get_output_embeddings(), SpartaLinear)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_explicit_targets_survive_saving(adapt, batch, tmp_path: Path, kind) -> None:
    adapted = adapt(kind, target_modules=ATTENTION[kind], layers_to_transform=[1])
    names = [n for n, m in adapted.named_modules() if isinstance(m, SpartaLinear)]
    assert len(names) == len(ATTENTION[kind])
    assert all(".1." in name and name.endswith(tuple(ATTENTION[kind])) for name in names)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(kind), tmp_path).eval()
    assert torch.equal(again(**batch).logits, adapted(**batch).logits)


def test_what_does_not_fit_is_refused(adapt) -> None:
    with pytest.raises(ValueError, match=r"Target modules .*nothing.* not found in the base model"):
        adapt(target_modules=["nothing"])
    with pytest.raises(UserError, match="block_layers = 3, but the model has 2 decoder layers") as e:
        adapt(block_layers=3)
    assert "\n" not in str(e.value)
    with pytest.raises(
        UserError, match="'lm_head' is outside; narrow target_modules or set router: off"
    ) as e:
        adapt(target_modules=["q_proj", "lm_head"])
    assert "\n" not in str(e.value)
    adapt(target_modules=["q_proj", "lm_head"], router="off")
    with pytest.raises(UserError, match="no active SpaRTA adapter"):
        active_adapter(tiny_model())


def test_the_last_block_may_be_shorter(adapt, batch) -> None:
    adapted = adapt(block_layers=2, model={"num_hidden_layers": 5})
    adapted(**batch)
    assert gate_values(adapted).shape == (3, 3, 2)
    readers = [
        [id(layer.router[0]) for layer in layers_of(adapted)].count(id(r)) for r in routers_of(adapted)
    ]
    assert readers == [14, 14, 7]


# ---------------------------------------------------------------- several adapters


def test_several_adapters_on_one_model(adapt, scramble, batch, tmp_path: Path) -> None:
    """Each answers as it does alone; switching, disabling, saving and deleting leave the others as they are."""
    alone, models = {}, {"a": adapt(), "b": adapt(rank_shared=1, rank_specific=3, components=2)}
    grow(models["b"], torch.Generator().manual_seed(1))
    scramble(models["b"], seed=8)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        alone[name] = model(**batch).logits
    both = PeftModel.from_pretrained(tiny_model(), tmp_path / "a", adapter_name="a").eval()
    both.load_adapter(tmp_path / "b", adapter_name="b")
    both.eval()
    for name in ("a", "b", "a"):
        both.set_adapter(name)
        assert torch.equal(both(**batch).logits, alone[name])
    with both.disable_adapter():
        assert torch.equal(both(**batch).logits, tiny_model()(**batch).logits)
    both.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "both/b").eval()
    assert torch.equal(again(**batch).logits, alone["b"])
    both.set_adapter("b")
    both.delete_adapter("a")
    assert torch.equal(both(**batch).logits, alone["b"])


def test_two_active_adapters_add_up(adapt, batch, tmp_path: Path) -> None:
    model = adapt(router="off", target_modules=["down_proj"], layers_to_transform=[1])
    model.save_pretrained(tmp_path)
    one = model(**batch).logits
    base = tiny_model()(**batch).logits
    model.load_adapter(tmp_path, adapter_name="twin")
    model.base_model.set_adapter(["default", "twin"])
    model.eval()
    deltas = [layer.get_delta_weight(n) for layer in layers_of(model) for n in ("default", "twin")]
    assert torch.equal(*deltas)
    summed = tiny_model()
    with torch.no_grad():
        summed.model.layers[1].mlp.down_proj.weight += 2 * deltas[0]
    torch.testing.assert_close(model(**batch).logits, summed(**batch).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one, base, atol=1e-4)


def test_only_the_active_adapter_trains_and_grows(adapt, batch) -> None:
    model = adapt()
    model.add_adapter("other", SpartaConfig(rank_shared=1, rank_specific=2, block_layers=2, components=2))
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains
    assert all(".default" in name for name in trains)
    grow(model, torch.Generator().manual_seed(1))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains
    assert model.peft_config["default"].tasks == 2
    assert model.peft_config["other"].tasks == 1
    assert routers_of(model)[0].sparta_old_A["other"].shape[1] == 0
    with pytest.raises(UserError, match="all adapters of one model need the same block_layers"):
        model.add_adapter("third", SpartaConfig(rank_shared=1, rank_specific=2, block_layers=1))


def test_adapters_that_share_a_config_object_grow_apart(adapt, scramble, batch, tmp_path: Path) -> None:
    """A preference trainer adds its frozen reference with the very config of the adapter that trains."""
    model = adapt()
    model.add_adapter("ref", model.peft_config["default"])
    grow(model, torch.Generator().manual_seed(1))
    scramble(model)
    assert (model.peft_config["default"].tasks, model.peft_config["ref"].tasks) == (2, 1)
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("ref", tmp_path / "ref")):
        model.set_adapter(name)
        again = PeftModel.from_pretrained(tiny_model(), folder).eval()
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_a_later_adapter_leaves_what_trains_as_it_was(adapt, tmp_path: Path) -> None:
    model = adapt()
    model.save_pretrained(tmp_path)
    freeze_new(model)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("other", SpartaConfig(rank_shared=1, rank_specific=2, block_layers=2))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains
    model.load_adapter(tmp_path, adapter_name="loaded")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains
    model.base_model.set_adapter("other")
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".other" in name for name in trains)
    assert any("router" in name for name in trains)


def test_a_router_beside_an_adapter_without_one(adapt, batch) -> None:
    model = adapt(router="off")
    alone = model(**batch).logits
    model.add_adapter("routed", SpartaConfig(rank_shared=1, rank_specific=2, block_layers=2))
    assert torch.equal(model(**batch).logits, alone)
    assert not routers_of(model)[0].gates
    model.set_adapter("routed")
    assert torch.equal(model(**batch).logits, tiny_model()(**batch).logits)
    assert gate_values(model).shape == (3, 1, 2)


# ---------------------------------------------------------------- merge and export


@pytest.mark.parametrize("kind", KINDS)
def test_merging_without_router_is_exact(adapt, batch, kind) -> None:
    adapted = adapt(kind, dtype=torch.float64, router="off", scale=0.5)
    expected = adapted(**batch).logits
    adapted.merge_adapter(safe_merge=True)
    assert adapted.base_model.model.base_model is not None
    torch.testing.assert_close(adapted(**batch).logits, expected, rtol=0, atol=1e-12)
    adapted.unmerge_adapter()
    torch.testing.assert_close(adapted(**batch).logits, expected, rtol=0, atol=1e-12)
    merged = adapted.merge_and_unload()
    assert not layers_of(merged)
    assert merged.state_dict().keys() == tiny_model(kind).state_dict().keys()
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=1e-12)


def test_gates_do_not_merge(adapt, batch) -> None:
    adapted = adapt()
    before = adapted(**batch).logits
    with pytest.raises(
        ValueError, match=r"gates depend on the input and cannot be merged; use .*merge_static"
    ):
        adapted.merge_adapter()
    assert torch.equal(adapted(**batch).logits, before)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_unloading_gives_the_base_back(adapt, kind) -> None:
    plain = assert_unloads(adapt(kind), kind=kind)
    assert not any(hasattr(module, ROUTER) for module in plain.modules())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_static_merge_folds_the_mean_gates_in(adapt, batch, kind) -> None:
    adapted = adapt(
        kind, dtype=torch.float64, model={"n_layer": 4} if kind == "gpt2" else {"num_hidden_layers": 4}
    )
    prompts = [{"input_ids": batch["input_ids"][i : i + 1, :6]} for i in range(3)]
    gates = []
    for prompt in prompts:
        adapted(**prompt)
        gates.append(gate_values(adapted)[0].double())
    gates = torch.stack(gates)
    weights = {}
    for name, layer in adapted.base_model.model.named_modules():
        if isinstance(layer, SpartaLinear):
            g = gates.mean(0)[layer.router[0].block]
            a_s, a_p = layer.sparta_shared_A["default"], layer.sparta_specific_A["default"]
            b_s, b_p = layer.sparta_shared_B["default"], layer.sparta_specific_B["default"]
            delta = g[0] * b_s @ a_s + g[1] * b_p @ a_p
            weight = layer.get_base_layer().weight
            weights[name] = (weight + (delta.T if kind == "gpt2" else delta)).detach()
    merged, spread = merge_static(adapted, prompts)
    torch.testing.assert_close(spread.double(), gates.std(0, correction=0), rtol=1e-4, atol=1e-6)
    assert spread.shape == (2, 2)
    state = merged.state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(state[f"{name}.weight"], weight, rtol=0, atol=1e-6)
    assert not any(hasattr(module, ROUTER) for module in merged.modules())
    with pytest.raises(UserError, match="at least one batch of prompts"):
        merge_static(adapt(), [])


def test_a_static_merge_over_one_prompt_answers_that_prompt_alike(adapt, batch) -> None:
    adapted = adapt()
    prompt = {"input_ids": batch["input_ids"][:1]}
    expected = adapted(**prompt).logits.detach()
    merged, spread = merge_static(adapted, [prompt])
    assert spread.abs().max() == 0
    torch.testing.assert_close(merged(**prompt).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("branch", ["shared", "specific"])
def test_an_exported_branch_is_plain_lora(adapt, batch, tmp_path: Path, kind, branch) -> None:
    """y = W0 x + c B A x, loaded in PEFT's own class."""
    adapted = adapt(kind, scale=0.7, specific="per_task")
    if branch == "specific":
        grow(adapted, torch.Generator().manual_seed(1))
    export_branch(adapted, tmp_path, branch)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert "graftwork" not in json.dumps(config)
    loaded = PeftModel.from_pretrained(tiny_model(kind), tmp_path).eval()
    reference = tiny_model(kind, dtype=torch.float64)
    modules = dict(reference.named_modules())
    for name, layer in adapted.base_model.model.named_modules():
        if isinstance(layer, SpartaLinear):
            a, b, (shared, _) = layer.factors("default")
            a, b = (a[:shared], b[:, :shared]) if branch == "shared" else (a[shared:], b[:, shared:])
            delta = 0.7 * b.double() @ a.double()
            with torch.no_grad():
                modules[name].weight += delta.T if kind == "gpt2" else delta
    expected = reference(**batch).logits
    torch.testing.assert_close(loaded(**batch).logits.double(), expected, rtol=1e-4, atol=1e-5)
    assert (expected - tiny_model(kind, dtype=torch.float64)(**batch).logits).abs().max() > 1e-3


def test_exporting_a_branch_that_is_not_there_is_refused(adapt, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the adapter has no shared branch"):
        export_branch(adapt(rank_shared=0), tmp_path / "out", "shared")
    assert not (tmp_path / "out").exists()


def test_the_method_is_registered_once() -> None:
    assert_registered_once(SpartaConfig(block_layers=2), SpartaModel)
