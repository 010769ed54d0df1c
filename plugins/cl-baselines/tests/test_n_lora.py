"""N-LoRA: the penalty in float64 and its gradient, both published forms, refusals, resumption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.testing.models import tiny_model
from graftwork.testing.runs import losses, run_tiny, tiny_recipe
from graftwork_cl_baselines.n_lora import STRENGTH, NLora, NLoraOptions, product_norm, sparsity
from graftwork_cl_baselines.stacked import factors
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

OPTIONS = {"rank": 2, "alpha": 4}


def recipe_of(checkpoint: Path, stream: Path, options: dict | None = None, **changes: Any) -> Any:
    changes = {"train": {"max_steps": 3}, "evaluate": {"cells": "final"}, **changes}
    plugins = {"n-lora": {**OPTIONS, **(options or {})}}
    return tiny_recipe(checkpoint, stream, plugins=plugins, seed=1, **changes)


def by_hand(a: torch.Tensor, b: torch.Tensor) -> float:
    """sum over i, j of |sum_k b_ik a_kj|, in plain Python."""
    rows, columns = b.double().tolist(), a.double().T.tolist()
    return sum(abs(sum(x * y for x, y in zip(r, c, strict=True))) for r in rows for c in columns)


def test_the_penalty_by_hand(stacked: Callable[..., PeftModel]) -> None:
    layers = factors(stacked(moved=True))
    assert len(layers) == 4
    total = sum(by_hand(layer.a.detach(), layer.b.detach()) for layer in layers)
    entries = sum(layer.b.shape[0] * layer.a.shape[1] for layer in layers)
    assert entries == 2 * (32 * 32 + 32 * 48)
    assert sparsity(layers, "product").item() == pytest.approx(total, rel=1e-5)
    assert sparsity(layers, "mean").item() == pytest.approx(total / entries, rel=1e-5)


def test_the_form_of_the_official_code_by_hand(stacked: Callable[..., PeftModel]) -> None:
    layers = factors(stacked(targets=["q_proj", "o_proj"], moved=True))
    total = sum(by_hand(layer.b.detach(), layer.a.detach()) for layer in layers)
    value = sparsity(layers, "code")
    assert value.item() == pytest.approx(total, rel=1e-5)
    value.backward()
    assert all(layer.a.grad.abs().sum() > 0 and layer.b.grad.abs().sum() > 0 for layer in layers)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 7), st.integers(0, 2**31))
def test_the_gradient_is_that_of_the_formula(out: int, rank: int, width: int, seed: int) -> None:
    """In float64 against finite differences and against what autograd makes of the plain product."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(out, rank, dtype=torch.float64, generator=generator, requires_grad=True)
    a = torch.randn(rank, width, dtype=torch.float64, generator=generator, requires_grad=True)
    plain = torch.autograd.grad(3 * (b @ a).abs().sum(), (b, a))
    ours = torch.autograd.grad(3 * product_norm(b, a), (b, a))
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_no_product_is_kept_for_the_backward_pass() -> None:
    b, a = torch.randn(200, 2, requires_grad=True), torch.randn(2, 300, requires_grad=True)
    saved: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        product_norm(b, a).backward()
    assert sorted(saved) == [400, 600]


def test_only_the_new_adapter_gets_a_gradient(stacked: Callable[..., PeftModel]) -> None:
    model = stacked(moved=True)
    sparsity(factors(model)).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert len(moved) == 8
    assert all(".t2." in name for name in moved)


def test_which_terms_there_are(stacked: Callable[..., PeftModel]) -> None:
    model = stacked(1, moved=True)

    def terms(**options: Any) -> list[tuple[str, float, str]]:
        found = NLora(NLoraOptions(**OPTIONS, **options)).loss_terms(None, model)
        return [(term.name, term.weight, term.per) for term in found]

    assert terms() == [("sparse", STRENGTH["product"], "step")]
    assert terms(form="mean") == [("sparse", STRENGTH["mean"], "step")]
    assert terms(form="code") == [("sparse", 0.4, "step")]
    assert terms(form="code", strength=2) == [("sparse", 2, "step")]
    assert terms(strength=0) == []
    term = NLora(NLoraOptions(**OPTIONS, form="mean")).loss_terms(None, model)[0]
    assert term.fn(model, {}).item() == sparsity(factors(model), "mean").item()


def test_the_default_strengths_are_of_one_size() -> None:
    """On square layers with independent entries: T5-large's 144 layers of 1024, rank 8 (here one, scaled)."""
    torch.manual_seed(0)
    a, b = torch.randn(8, 1024), torch.randn(1024, 8)
    code, product = (a @ b).abs().sum().item(), (b @ a).abs().sum().item()
    assert STRENGTH["product"] * product == pytest.approx(STRENGTH["code"] * code, rel=0.25)
    mean = product / 1024**2
    assert STRENGTH["mean"] * mean == pytest.approx(STRENGTH["code"] * 144 * code, rel=0.25)


def test_a_run_is_penalised_and_resumes_to_the_same_bits(
    checkpoint: Path, stream: Path, resumes_exactly: Callable[..., Path], logged: Callable[..., Any]
) -> None:
    train = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = resumes_exactly(recipe_of(checkpoint, stream, train=train), None)
    values = [log["loss/sparse"] for log in logged(whole)]
    assert len(values) == 6
    # B starts at zero in every task.
    assert values[0] == values[3] == 0
    assert all(value > 0 for value in values[1:3] + values[4:])


def test_no_strength_is_incremental_lora(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    run_tiny(recipe_of(checkpoint, stream, {"strength": 0}), tmp_path / "off")
    plain = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "policy": "stacked",
    }
    shared = {"train": {"max_steps": 3}, "evaluate": {"cells": "final"}, "seed": 1}
    run_tiny(tiny_recipe(checkpoint, stream, adapter=plain, **shared), tmp_path / "plain")
    run_tiny(recipe_of(checkpoint, stream), tmp_path / "on")
    assert losses(tmp_path / "off") == losses(tmp_path / "plain")
    assert losses(tmp_path / "on") != losses(tmp_path / "plain")


def test_the_official_form_is_refused_where_a_layer_is_not_square() -> None:
    model = tiny_model()
    plugin = NLora(NLoraOptions(**OPTIONS, form="code"))
    with pytest.raises(UserError, match=r"'model\.layers\.0\.self_attn\.k_proj' is 16 x 32") as caught:
        plugin.adapter_config(None, model)
    assert "\n" not in str(caught.value)
    assert not any("lora" in name for name, _ in model.named_modules())
    square = NLora(NLoraOptions(**OPTIONS, form="code", target_modules=["q_proj", "o_proj"]))
    assert square.adapter_config(None, model).policy == "stacked"


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"strength": -1}, {"form": "sum"}, {"lambda": 1}, {"form": "code"}]
)
def test_bad_options_are_refused(options: dict, checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=next(iter(options))) as caught:
        run_tiny(recipe_of(checkpoint, stream, options), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
