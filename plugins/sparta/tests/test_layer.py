"""The layer: what the two branches compute, against PEFT's LoRA and float64."""

from __future__ import annotations

import pytest
import torch
from graftwork.testing.models import tiny_model
from graftwork_sparta import SpartaConfig, grow
from graftwork_sparta.layer import SpartaLinear
from graftwork_sparta.model import layers_of
from peft import LoraConfig, get_peft_model
from torch import nn

KINDS = ["llama", "mistral", "qwen2", "gpt2"]


def lora_twin(adapted, rank: int, *, scale: float = 1.0, kind: str = "llama", dtype=torch.float32):
    """Return PEFT's LoRA on the same base, its factors the stacked ones of ``adapted``."""
    config = LoraConfig(
        r=rank,
        lora_alpha=rank * scale,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=kind == "gpt2",
    )
    twin = get_peft_model(tiny_model(kind, dtype=dtype), config).eval()
    if dtype == torch.float64:
        twin.to(dtype)
    modules = dict(twin.named_modules())
    for name, layer in adapted.named_modules():
        if isinstance(layer, SpartaLinear):
            a, b, _ = layer.factors("default")
            with torch.no_grad():
                modules[name].lora_A["default"].weight.copy_(a)
                modules[name].lora_B["default"].weight.copy_(b)
    return twin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("branch", ["shared", "specific"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_branch_without_router_is_lora_bit_for_bit(adapt, batch, kind, branch, dtype) -> None:
    ranks = {"rank_shared": 0, "rank_specific": 0, f"rank_{branch}": 4}
    adapted = adapt(kind, dtype=dtype, router="off", scale=0.5, **ranks)
    twin = lora_twin(adapted, 4, scale=0.5, kind=kind, dtype=dtype)
    ours, theirs = adapted(**batch), twin(**batch)
    assert torch.equal(ours.logits, theirs.logits)
    ours.loss.backward()
    theirs.loss.backward()
    modules = dict(twin.named_modules())
    compared = 0
    for name, layer in adapted.named_modules():
        if isinstance(layer, SpartaLinear):
            for part in "AB":
                grad = getattr(layer, f"sparta_{branch}_{part}")["default"].grad
                assert torch.equal(grad, getattr(modules[name], f"lora_{part}")["default"].weight.grad)
                assert grad.abs().sum() > 0
                compared += 1
    assert compared == 2 * len(layers_of(adapted))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_two_branches_are_one_lora_of_stacked_factors(adapt, batch, kind) -> None:
    adapted = adapt(kind, dtype=torch.float64, router="off", scale=0.7)
    twin = lora_twin(adapted, 6, scale=0.7, kind=kind, dtype=torch.float64)
    plain = tiny_model(kind, dtype=torch.float64)
    ours = adapted(**batch).logits
    torch.testing.assert_close(ours, twin(**batch).logits, rtol=0, atol=1e-12)
    assert (ours - plain(**batch).logits).abs().max() > 1e-3


@pytest.mark.parametrize("router", ["prompt", "lineage"])
def test_the_layer_weighs_each_branch_by_its_gate(adapt, batch, router) -> None:
    """y = W0 x + c (g_s B_s A_s x + g_p B_p A_p x), row by row, in float64."""
    adapted = adapt(dtype=torch.float64, router=router, scale=0.7)
    layer = layers_of(adapted)[0]
    seen = {}
    layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    adapted(**batch)
    gates = layer.router[0].gates["default"].double()
    assert gates.std() > 1e-3
    x, base = seen["x"], layer.get_base_layer()
    expected = base(x)
    for column, part in enumerate(("shared", "specific")):
        a = getattr(layer, f"sparta_{part}_A")["default"]
        b = getattr(layer, f"sparta_{part}_B")["default"]
        expected = expected + 0.7 * gates[:, column, None, None] * (x @ a.T @ b.T)
    torch.testing.assert_close(seen["y"], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("router", ["prompt", "off"])
def test_a_fresh_adapter_is_invisible(adapt, batch, kind, router) -> None:
    adapted = adapt(kind, scrambled=False, router=router)
    assert torch.equal(adapted(**batch).logits, tiny_model(kind)(**batch).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_stays_near_fp32(adapt, batch, kind) -> None:
    base_fp32, base_bf16 = tiny_model(kind), tiny_model(kind, dtype=torch.bfloat16)
    fp32, bf16 = adapt(kind), adapt(kind, dtype=torch.bfloat16)
    low = bf16(**batch).logits
    assert low.dtype == torch.bfloat16
    change = fp32(**batch).logits - base_fp32(**batch).logits
    error = (low.float() - base_bf16(**batch).logits.float() - change).norm() / change.norm()
    assert error < 0.1


def test_lineage_init_has_its_own_spread(adapt) -> None:
    adapted = adapt(scrambled=False, init="lineage", router="off")
    for part, rank in (("shared", 2), ("specific", 4)):
        values = torch.cat(
            [getattr(layer, f"sparta_{part}_A")["default"].flatten() for layer in layers_of(adapted)]
        )
        assert values.std().item() == pytest.approx(1 / rank**2, rel=0.1)


def test_projection_keeps_the_branches_orthogonal_while_training(adapt, batch) -> None:
    adapted = adapt(orth_mode="project", router="off")
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        for layer in layers_of(adapted):
            shared, free = layer.sparta_shared_A["default"], layer.sparta_specific_A["default"]
            effective = layer.specific_a("default")
            overlap = (shared @ effective.T).norm()
            assert overlap < 1e-6 * shared.norm() * effective.norm()
            assert (shared @ free.T).norm() > 1e-3
            left = layer.sparta_shared_B["default"] @ shared
            right = layer.sparta_specific_B["default"] @ effective
            assert (left * right).sum().abs() < 1e-6 * left.norm() * right.norm()
        optimizer.zero_grad()
        adapted(**batch).loss.backward()
        optimizer.step()


def test_project_computes_with_the_projected_factor(adapt) -> None:
    """In float64: A_p (I - Q Q^T) with Q from the normal equations instead of a QR."""
    layer = layers_of(adapt(orth_mode="project", router="off"))[0]
    shared = layer.sparta_shared_A["default"].double()
    free = layer.sparta_specific_A["default"].double()
    expected = free - free @ shared.T @ torch.linalg.inv(shared @ shared.T) @ shared
    torch.testing.assert_close(layer.specific_a("default").double(), expected, rtol=1e-5, atol=1e-6)


def test_a_branch_per_task_starts_at_zero_and_keeps_the_older_ones(adapt, batch) -> None:
    adapted = adapt(specific="per_task", router="off")
    before = adapted(**batch).logits
    olds = [layer.sparta_specific_A["default"].detach().clone() for layer in layers_of(adapted)]
    grow(adapted, torch.Generator().manual_seed(1))
    torch.testing.assert_close(adapted(**batch).logits, before, rtol=1e-5, atol=1e-6)
    for layer, old in zip(layers_of(adapted), olds, strict=True):
        assert torch.equal(layer.sparta_frozen_A["default"], old)
        assert not layer.sparta_frozen_A["default"].requires_grad
        assert not torch.equal(layer.sparta_specific_A["default"], old)
        assert layer.sparta_specific_B["default"].abs().sum() == 0
        assert layer.factors("default")[2] == (2, 8)


def test_what_the_layer_refuses() -> None:
    config = SpartaConfig(rank_shared=2, rank_specific=9, router="off")
    with pytest.raises(ValueError, match="rank 9 is larger than a target layer of 8 inputs and 16 outputs"):
        SpartaLinear(nn.Linear(8, 16), "default", config)
    with pytest.raises(TypeError, match="Embedding is none, take it out of target_modules"):
        SpartaLinear(nn.Embedding(8, 16), "default", config)
    with pytest.raises(ValueError, match="positive rank in at least one branch"):
        SpartaConfig(rank_shared=0, rank_specific=0)
    with pytest.raises(ValueError, match="block_layers must be at least 1, not 0"):
        SpartaConfig(block_layers=0)
    with pytest.raises(ValueError, match="trains no biases"):
        SpartaConfig(bias="all")
