"""Sites: found by structure, in the orientation of the mathematics, refused where there is no one place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork.edit.errors import ArchitectureError
from graftwork.edit.sites import find_sites
from graftwork.testing.editing import editable_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS: dict[str, dict[str, Any]] = {
    "gpt_neox": {**SMALL, "intermediate_size": 48},
    "opt": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "bloom": {"vocab_size": 259, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "qwen3": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16},
    "gptj": {"vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 64},
    "phi": {**SMALL, "intermediate_size": 48},
    "gemma2": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16},
}


def make(kind: str) -> Any:
    if kind in OTHERS:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **OTHERS[kind])).eval()
    return editable_model(kind)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2", *OTHERS])
def test_a_site_maps_its_input_to_its_output(kind: str) -> None:
    model = make(kind)
    sites = find_sites(model)
    count = model.config.get_text_config().num_hidden_layers
    assert [site.order for site in sites] == [(layer, kind) for layer in range(count) for kind in (0, 1)]
    seen: dict[str, Any] = {}
    for site in sites:
        site.module.register_forward_hook(
            lambda _, args, output, name=site.name: seen.__setitem__(name, (args[0], output))
        )
    with torch.no_grad():
        model(input_ids=torch.arange(5, 12)[None])
    for site in sites:
        assert site.matrix.shape == (site.h, site.d) == (32, site.d)
        key, value = (one.reshape(-1, one.shape[-1]) for one in seen[site.name])
        bias: Any = site.module.bias
        weight: Any = site.module.weight
        made = key @ site.matrix.T + (0 if bias is None else bias)
        torch.testing.assert_close(made, value, atol=1e-5, rtol=1e-4)
        assert site.matrix.data_ptr() == weight.data_ptr()


def test_layers_and_kinds_are_chosen_and_checked(model: Any) -> None:
    assert [site.name for site in find_sites(model, ["mlp"], [2, 0])] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.2.mlp.down_proj",
    ]
    with pytest.raises(ArchitectureError, match="layers 0 to 3, and an edit asks for layer 4"):
        find_sites(model, layers=[4])


def test_mixtures_of_experts_are_refused() -> None:
    config = AutoConfig.for_model(
        "mixtral", **SMALL, intermediate_size=48, num_key_value_heads=2, num_local_experts=2
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ArchitectureError, match=r"'model.layers.0'.*its linears: .*o_proj"):
        find_sites(model, ["mlp"])
    assert len(find_sites(model, ["attn"])) == 2


def test_shared_and_rounded_weights_and_adapters_are_refused(model: Any) -> None:
    first, second = find_sites(model, ["mlp"], [0, 1])
    second.module.weight = first.module.weight
    with pytest.raises(ArchitectureError, match="is shared with"):
        find_sites(model, ["mlp"], [0, 1])
    rounded = editable_model()
    site = find_sites(rounded, ["mlp"], [0])[0]
    site.module.weight = nn.Parameter(site.matrix.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ArchitectureError, match="holds rounded weights"):
        find_sites(rounded, ["mlp"], [0])
    from peft import LoraConfig, inject_adapter_in_model

    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["down_proj"]), editable_model())
    with pytest.raises(ArchitectureError, match="an adapter that is not merged"):
        find_sites(adapted, ["mlp"], [0])


def test_tied_embeddings_do_not_matter() -> None:
    model = editable_model(tie_word_embeddings=True)
    assert len(find_sites(model)) == 8
