"""Folded weights compute what the hook does, and nothing is folded where that is not so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork_cale import LayerEnhancement, fold
from graftwork_cale.fold import ARCHITECTURES
from graftwork_cale.layers import layers_of
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

Lively = Callable[..., Any]


def build(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    small = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.3}
    settings = {**small, **heads, "rms_norm_eps": 0.0, **changes}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).to(dtype).eval()


def pair(model: Any, ids: torch.Tensor, strength: float, layer: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    with LayerEnhancement(model, layer, strength, "amplify", "all"), torch.no_grad():
        hooked = model(ids).logits
    fold(model, layer, strength)
    with torch.no_grad():
        return hooked, model(ids).logits


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("strength", [0.5, 2.0, 4.0])
def test_powers_of_two_are_exact(ids: torch.Tensor, kind: str, strength: float) -> None:
    hooked, folded = pair(build(kind), ids, strength)
    assert torch.equal(hooked, folded)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_other_strengths_up_to_rounding(ids: torch.Tensor, kind: str, layer: int) -> None:
    model = build(kind, rms_norm_eps=1e-6)
    with torch.no_grad():
        before = model(ids).logits
    hooked, folded = pair(model, ids, 1.3, layer)
    torch.testing.assert_close(hooked, folded, atol=1e-4, rtol=1e-4)
    assert (folded - before).abs().max() > 1e-2


def test_biases_are_folded_too(ids: torch.Tensor) -> None:
    model = build("llama", attention_bias=True, mlp_bias=True)
    for layer in layers_of(model):
        torch.nn.init.normal_(layer.self_attn.o_proj.bias)  # type: ignore[union-attr, arg-type]
        torch.nn.init.normal_(layer.mlp.down_proj.bias)  # type: ignore[union-attr, arg-type]
    hooked, folded = pair(model, ids, 2.0)
    assert torch.equal(hooked, folded)


def test_a_folded_checkpoint_needs_nothing(ids: torch.Tensor, tmp_path: Any) -> None:
    model = build("llama")
    hooked, _ = pair(model, ids, 2.0)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, hooked)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gemma2", "Gemma2ForCausalLM"),
        ("gemma3_text", "Gemma3ForCausalLM"),
        ("olmo2", "Olmo2ForCausalLM"),
        ("cohere", "CohereForCausalLM"),
    ],
)
def test_architectures_without_the_algebra_are_refused_by_name(
    kind: str, name: str, ids: torch.Tensor
) -> None:
    model = build(kind, layer_norm_eps=1e-5) if kind == "cohere" else build(kind, head_dim=8)
    with pytest.raises(UserError, match=f"cale-fold does not hold for {name}"):
        fold(model, 2, 2.0)
    # The hook works there all the same.
    with torch.no_grad():
        before = model(ids).logits
        with LayerEnhancement(model, 2, 2.0):
            assert not torch.equal(model(ids).logits[:, -1], before[:, -1])


def test_parallel_residuals_and_layer_norms_are_refused_by_name(lively: Lively) -> None:
    gptj = AutoConfig.for_model("gptj", vocab_size=259, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    with pytest.raises(UserError, match="GPTJForCausalLM"):
        fold(AutoModelForCausalLM.from_config(gptj), 1, 2.0)
    with pytest.raises(UserError, match="GPT2LMHeadModel"):
        fold(lively("gpt2"), 2, 2.0)


@pytest.mark.parametrize(
    ("layer", "strength", "problem"),
    [(4, 2.0, "no effect after the final norm"), (0, 2.0, "not in a model"), (2, 0.0, "positive finite")],
)
def test_nothing_is_changed_by_what_is_refused(
    ids: torch.Tensor, layer: int, strength: float, problem: str
) -> None:
    model = build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=problem):
        fold(model, layer, strength)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_adapters_and_packed_weights_are_refused() -> None:
    model = build("llama")
    with pytest.raises(UserError, match="merge_and_unload"):
        fold(get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"])), 2, 2.0)
    layers_of(model)[3].mlp.down_proj = torch.nn.quantized.dynamic.Linear(48, 32)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="fold before quantising"):
        fold(model, 2, 2.0)
