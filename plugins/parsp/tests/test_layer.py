"""Equation (4): what a layer computes, which directions it can learn, and where its bytes stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.testing.models import tiny_model
from graftwork_kernels.region_update import fold_rows
from graftwork_parsp import Basis, ParspConfig, find_mlps, fold, top_directions
from graftwork_parsp.layer import ColumnDelta, RowDelta
from graftwork_parsp.model import layers_of
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

KINDS = ["llama", "mistral", "qwen2", "gpt2"]
SEEDS = st.integers(0, 2**31)


def layer_of(base: nn.Module, **fields: Any) -> RowDelta:
    kind = ColumnDelta if fields.get("down") == "columns" else RowDelta
    return kind(base, "default", ParspConfig(**{"density": 0.5, **fields}))


def linear(m: int = 8, d: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(d, m)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(m, d, generator=generator))
        layer.bias.copy_(torch.randn(m, generator=generator))
    return layer.to(dtype).requires_grad_(False)


def basis_of(d: int, k: int, seed: int = 0) -> Basis:
    x = torch.randn(k, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return top_directions(x.T @ x, 0.0)


def train(layer: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20, clip: float = 0.0) -> None:
    """Fit random targets."""
    generator = torch.Generator().manual_seed(9)
    for _ in range(steps):
        x, target = torch.randn(16, 12, generator=generator), torch.randn(16, 8, generator=generator)
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_([p for p in layer.parameters() if p.requires_grad], clip)
        optimizer.step()


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


@pytest.mark.parametrize("clip", [0.0, 0.01])
@pytest.mark.parametrize("form", ["full", "lora"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("k", [4, 9])
def test_both_constraints_hold_under_any_optimizer(name: str, form: str, clip: float, k: int) -> None:
    """Rows outside the core: the bytes of W. Inside: (W_eff - W) U = 0."""
    base = linear()
    weight = base.weight.clone()
    layer = layer_of(base, form=form, rank=3)
    core, basis = torch.tensor([1, 2, 6]), basis_of(12, k)
    layer.begin("default", core, basis, torch.Generator().manual_seed(0))
    train(layer, OPTIMIZERS[name]([p for p in layer.parameters() if p.requires_grad]), clip=clip)
    change = layer.get_delta_weight("default").detach()
    outside = torch.tensor([0, 3, 4, 5, 7])
    assert torch.equal((weight + change)[outside], weight[outside])
    assert change[core].norm() > 1e-3
    span = torch.randn(k, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions = torch.linalg.qr(span.T).Q
    assert (change.double() @ directions).norm() < 1e-6 * layer.theta("default").norm()
    assert torch.equal(base.weight, weight)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 11))
def test_inputs_inside_the_protected_span_see_no_change(seed: int, k: int) -> None:
    base = linear(seed=seed, dtype=torch.float64)
    layer = layer_of(base).double()
    basis = basis_of(12, k, seed)
    layer.begin("default", torch.tensor([0, 5]), basis, torch.Generator())
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        theta = layer.parsp_theta["default"]
        theta.copy_(torch.randn(theta.shape, generator=generator, dtype=torch.float64))
    span = torch.randn(k, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.randn(20, k, generator=generator, dtype=torch.float64) @ span
    # U is kept in fp32: what is left of it is its rounding.
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=2e-6 * x.norm().item())
    if k < 11:
        other = torch.randn(20, 12, generator=generator, dtype=torch.float64)
        assert (layer(other) - base(other)).abs().max() > 1e-3


def test_without_a_past_it_is_row_fine_tuning_bit_for_bit() -> None:
    """Against plain weights whose gradient is masked, SGD. Small dyadic numbers make every sum exact."""
    base = linear(4, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        base.weight.copy_(torch.randint(-3, 4, (4, 4), generator=generator))
        base.bias.zero_()
    reference = base.weight.clone().requires_grad_(True)
    mask = torch.tensor([[1.0], [0], [0], [1]]).double()
    layer = layer_of(base).double()
    layer.begin("default", torch.tensor([0, 3]), None, torch.Generator())
    optimizer = torch.optim.SGD([layer.parsp_theta["default"]], lr=2**-4)
    for _ in range(4):
        x = torch.randint(-2, 3, (3, 4), generator=generator).double()
        y = torch.randint(-2, 3, (3, 4), generator=generator).double()
        optimizer.zero_grad()
        own = ((layer(x) - y).square() / 2).sum()
        own.backward()
        optimizer.step()
        loss = ((x @ reference.T - y).square() / 2).sum()
        (gradient,) = torch.autograd.grad(loss, reference)
        with torch.no_grad():
            reference -= 2**-4 * mask * gradient
        assert own.item() == loss.item()
    assert torch.equal(base.weight + layer.get_delta_weight("default"), reference)
    assert not torch.equal(base.weight, reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("down", ["none", "columns"])
@pytest.mark.parametrize("form", ["full", "lora"])
def test_the_model_computes_what_changed_weights_would(adapt, batch, kind, down, form) -> None:
    """Against the base model with W + D + Theta P written into its matrices, in float64."""
    adapted = adapt(kind, dtype=torch.float64, down=down, form=form, rank=3)
    reference = tiny_model(kind, dtype=torch.float64)
    found = layers_of(adapted)
    kinds = {type(layer) for layer in found.values()}
    assert kinds == ({RowDelta, ColumnDelta} if down == "columns" else {RowDelta})
    for name, layer in found.items():
        rows, core = layer.parsp_rows["default"].long(), layer.parsp_core["default"].long()
        if form == "lora":
            theta = layer.parsp_theta_B["default"] @ layer.parsp_theta_A["default"]
        else:
            theta = layer.parsp_theta["default"]
        u = layer.parsp_basis["default"]
        assert not layer.parsp_complement["default"]
        p = torch.eye(len(u)).double() - u @ u.T
        kept = p @ theta if isinstance(layer, ColumnDelta) else theta @ p
        change = torch.zeros(layer.neurons, layer.width).double()
        change[rows] = layer.parsp_delta["default"]
        change[core] += kept
        weight = reference.get_submodule(name).weight
        neuron_is_column = isinstance(layer, ColumnDelta) != (kind == "gpt2")
        with torch.no_grad():
            weight += change.T if neuron_is_column else change
        assert len(rows) > len(core) > 0
        assert layer.parsp_delta["default"].abs().max() > 1e-3
    expected = reference(**batch).logits
    torch.testing.assert_close(adapted(**batch).logits, expected, rtol=0, atol=1e-10)
    plain = tiny_model(kind, dtype=torch.float64)(**batch).logits
    assert (expected - plain).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert torch.equal(adapted(**batch).logits, plain)


def test_folding_changes_no_output(adapt, batch) -> None:
    adapted = adapt(down="columns")
    before = adapted(**batch).logits
    fold(adapted)
    assert torch.equal(adapted(**batch).logits, before)
    for layer in layers_of(adapted).values():
        for store in ("parsp_theta", "parsp_core", "parsp_basis"):
            assert getattr(layer, store)["default"].numel() == 0


def test_a_fresh_adapter_does_nothing_and_can_learn(adapt, batch) -> None:
    adapted = adapt(learned=False)
    assert torch.equal(adapted(**batch).logits, tiny_model()(**batch).logits)
    trains = [p for p in adapted.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trains) == 2 * 2 * 12 * 32
    adapted(**batch).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in trains)
    layer = next(iter(layers_of(adapted).values()))
    assert layer.parsp_core["default"].tolist() == list(range(0, 48, 4))


# ---------------------------------------------------------------- in place


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing(adapt, batch, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        adapted = adapt().train()
        if checkpointing:
            adapted.enable_input_require_grads()
            adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
        adapted(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("input_trains", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "other"])
def test_adding_in_place_leaves_gradients_right(kind: str, bias: bool, input_trains: bool) -> None:
    """Also where neither the base nor its input has a gradient."""

    class Other(nn.Linear):
        """Stands for a quantised layer."""

    if kind == "conv1d":
        base = Conv1D(8, 12).double().requires_grad_(False)
        dense = base.weight.T
    else:
        base = (nn.Linear if kind == "linear" else Other)(12, 8, bias=bias).double().requires_grad_(False)
        dense = base.weight
    layer = layer_of(base).double()
    layer.begin("default", torch.tensor([1, 4]), basis_of(12, 3), torch.Generator())
    theta = layer.parsp_theta["default"]
    with torch.no_grad():
        theta.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x.requires_grad_(input_trains)
    layer(x).sin().sum().backward()
    u = layer.parsp_basis["default"]
    copy, own = theta.detach().clone().requires_grad_(True), x.detach().clone().requires_grad_(True)
    change = torch.zeros(8, 12).double().index_copy(0, torch.tensor([1, 4]), copy - copy @ u @ u.T)
    expected = own @ (dense + change).T + (base.bias if base.bias is not None else 0)
    expected.sin().sum().backward()
    torch.testing.assert_close(theta.grad, copy.grad)
    if input_trains:
        torch.testing.assert_close(x.grad, own.grad)


def test_theta_p_is_formed_in_fp32_under_autocast() -> None:
    layer = layer_of(linear())
    layer.begin("default", torch.tensor([0, 1]), basis_of(12, 4), torch.Generator())
    with torch.no_grad():
        layer.parsp_theta["default"].normal_(generator=torch.Generator().manual_seed(1))
    plain = layer.projected("default")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.projected("default"), plain)
        assert layer(torch.randn(2, 12)).dtype == torch.bfloat16


def test_a_half_precision_base_keeps_an_exact_adapter(adapt, batch) -> None:
    adapted = adapt(dtype=torch.bfloat16)
    layers = layers_of(adapted).values()
    assert all(layer.get_base_layer().weight.dtype == torch.bfloat16 for layer in layers)
    assert all(p.dtype == torch.float32 for n, p in adapted.named_parameters() if "parsp_" in n)
    assert adapted(**batch).logits.dtype == torch.bfloat16
    before = [(layer.parsp_delta["default"], layer.parsp_basis["default"]) for layer in layers]
    adapted.to(torch.bfloat16)
    for layer, (delta, basis) in zip(layers, before, strict=True):
        assert torch.equal(layer.parsp_delta["default"], delta)
        assert torch.equal(layer.parsp_basis["default"], basis)
        assert layer.parsp_theta["default"].dtype == torch.bfloat16
        # What DeepSpeed's half-precision copy of Theta loses, the projection does not.
        change, u = layer.projected("default").double(), basis.double()
        assert (change @ u).norm() < 1e-6 * change.norm()


# ---------------------------------------------------------------- merge


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("down", ["none", "columns"])
def test_merging_rounds_once_and_unmerging_gives_the_bytes_back(adapt, batch, kind, dtype, down) -> None:
    adapted = adapt(kind, dtype=dtype, down=down)
    base = {name: layer.get_base_layer().weight.clone() for name, layer in layers_of(adapted).items()}
    expected = {
        name: (base[name].float() + layer.get_delta_weight("default").detach()).to(dtype)
        for name, layer in layers_of(adapted).items()
    }
    before = adapted(**batch).logits
    adapted.merge_adapter(safe_merge=True)
    for name, layer in layers_of(adapted).items():
        assert torch.equal(layer.get_base_layer().weight, expected[name])
        assert layer.merged
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(adapted(**batch).logits, before, rtol=0, atol=tolerance)
    adapted.unmerge_adapter()
    for name, layer in layers_of(adapted).items():
        assert torch.equal(layer.get_base_layer().weight, base[name])
    assert torch.equal(adapted(**batch).logits, before)
    merged = adapted.merge_and_unload()
    assert not layers_of(merged)
    assert merged.state_dict().keys() == tiny_model(kind).state_dict().keys()
    for name, weight in expected.items():
        assert torch.equal(merged.get_submodule(name).weight, weight)


def test_merging_task_by_task_leaks_more_than_merging_once() -> None:
    """Why D is kept apart in fp32: in bf16 every task's small change is rounded, and so leaves the null space."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator).bfloat16()
    span = torch.randn(32, 128, generator=generator, dtype=torch.float64)
    basis = top_directions(span.T @ span, 0.0)
    u = torch.linalg.qr(span.T).Q
    once, each = torch.zeros(64, 128), weight.clone()
    for _ in range(20):
        change = fold_rows(3e-3 * torch.randn(64, 128, generator=generator), basis.matrix, basis.complement)
        once += change
        each = (each.float() + change).bfloat16()
    merged = (weight.float() + once).bfloat16()

    def leak(now: torch.Tensor) -> float:
        return ((now.double() - weight.double()) @ u).norm().item()

    assert (once.double() @ u).norm() < 1e-5 * once.norm()
    assert leak(each) > 2 * leak(merged)


def test_what_cannot_merge_is_refused() -> None:
    class Packed(nn.Module):
        in_features, out_features = 12, 8

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(48, dtype=torch.uint8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., :8] * 1.0

    layer = layer_of(Packed())
    layer.begin("default", torch.tensor([2]), None, torch.Generator())
    with torch.no_grad():
        layer.parsp_theta["default"].fill_(1.0)
    x = torch.randn(3, 12)
    expected = x[:, :8].clone()
    expected[:, 2] += x.sum(1)
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(UserError, match="quantised weight of a Packed; keep the adapter beside it"):
        layer.merge()
    layer = layer_of(linear())
    with torch.no_grad():
        layer.parsp_theta["default"].fill_(float("inf"))
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match="weights that are not numbers"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)


def test_what_is_no_linear_layer_or_too_small_is_refused() -> None:
    with pytest.raises(TypeError, match="Embedding is none"):
        layer_of(nn.Embedding(4, 4))
    with pytest.raises(ValueError, match=r"density 0.1 of 8 neurons is none; raise it to at least 0.12"):
        layer_of(linear(), density=0.1)
    with pytest.raises(ValueError, match="density is a share"):
        ParspConfig(density=1.5)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        ParspConfig(rank=0)


# ---------------------------------------------------------------- limits


def test_density_one_without_a_past_is_plain_fine_tuning_of_the_input_projections(batch) -> None:
    adapted = get_peft_model(tiny_model(dtype=torch.float64), ParspConfig(density=1.0)).double()
    reference = tiny_model(dtype=torch.float64).requires_grad_(False)
    weights = [reference.get_submodule(key).weight for mlp in find_mlps(reference) for key in mlp.ins]
    for weight in weights:
        weight.requires_grad_(True)
    pairs = [
        (adapted, torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)),
        (reference, torch.optim.SGD(weights, lr=0.5)),
    ]
    losses = []
    for model, optimizer in pairs:
        own = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            own.append(loss.item())
        losses.append(own)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0][-1] < losses[0][0] - 1e-3


def test_eps_zero_and_a_full_past_leave_nothing_to_learn() -> None:
    layer = layer_of(linear())
    x = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer.begin("default", torch.tensor([0, 1]), top_directions(x.T @ x, 0.0), torch.Generator())
    train(layer, torch.optim.AdamW([layer.parsp_theta["default"]], lr=0.1))
    assert torch.equal(layer.get_delta_weight("default"), torch.zeros(8, 12))
