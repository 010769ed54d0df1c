"""What a decoder is made of, and where the channels of a place come from."""

from __future__ import annotations

import pytest
import torch
from graftwork import UserError
from graftwork.testing.models import tiny_model
from graftwork.transform.structure import Place, enter, find_layers, find_norm, leave, places, skeleton


@pytest.mark.parametrize(
    ("kind", "layers", "norm"),
    [("llama", "model.layers", "model.norm"), ("gpt2", "transformer.h", "transformer.ln_f")],
)
def test_layers_and_norm_are_found(kind: str, layers: str, norm: str) -> None:
    model = tiny_model(kind)
    assert find_layers(model)[0] == layers
    assert find_norm(model) == norm


def test_a_skeleton_has_no_weights_and_real_buffers() -> None:
    config = tiny_model("llama").config
    model = skeleton(config, torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.device.type for b in model.buffers()} == {"cpu"}
    assert model.config is not config


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(UserError, match="t5 is an encoder-decoder"):
        skeleton(tiny_model("t5").config, torch.float32)


def test_entering_and_leaving_is_a_forward_without_layers() -> None:
    model, ids = tiny_model("llama").eval(), torch.arange(12)[None]
    hidden, calls = enter(model, ids)
    torch.testing.assert_close(hidden, model.model.embed_tokens(ids))
    assert len(calls) == len(model.model.layers)
    with torch.no_grad():
        for layer, kwargs in zip(model.model.layers, calls, strict=True):
            hidden = layer(hidden, **kwargs)
        torch.testing.assert_close(leave(model, hidden), model(ids).logits)
    assert len(model.model.layers) == 2


def test_places_of_the_llama_family() -> None:
    model = tiny_model("llama")
    found = places(model.model.layers[0], model.config)
    assert [place.name for place in found] == ["qkv", "o", "gate_up", "down"]
    assert [place.source for place in found] == [
        "input_layernorm",
        "self_attn.v_proj",
        "post_attention_layernorm",
        "mlp.up_proj",
    ]


def test_places_of_another_family_are_refused() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(UserError, match=r"gpt2 model has no 'self_attn\.q_proj'"):
        places(model.transformer.h[0], model.config)


def test_scaling_the_source_scales_the_inputs_of_the_place() -> None:
    """Four query heads on two value heads: each value channel reaches the output projection twice."""
    model, ids = tiny_model("llama").eval(), torch.arange(12)[None]
    layer = model.model.layers[0]
    seen: list[torch.Tensor] = []
    layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    place = next(one for one in places(layer, model.config) if one.name == "o")
    scale = torch.rand(16, generator=torch.Generator().manual_seed(0)) + 0.5
    with torch.no_grad():
        model(ids)
        layer.self_attn.v_proj.weight.mul_(scale[:, None])
        model(ids)
    torch.testing.assert_close(seen[1], seen[0] * place.spread(scale))


def test_gathered_is_the_mean_over_what_was_spread() -> None:
    place = Place("o", ("o",), "v", "linear", repeats=3, head_dim=4)
    values = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(place.gathered(place.spread(values)), values)
    spread = torch.randn(24, dtype=torch.float64)
    expected = torch.stack([spread.view(2, 3, 4)[:, k] for k in range(3)]).mean(0).flatten()
    torch.testing.assert_close(place.gathered(spread), expected)
