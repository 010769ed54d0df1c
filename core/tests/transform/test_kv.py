"""Keys and values rounded in front of attention: the numbers, generation with a cache, and models refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.testing.models import tiny_model
from graftwork.transform.hadamard import hadamard_matrix
from graftwork.transform.kv import check_kv, kv_attention, plain_attention, round_kv, set_kv
from graftwork.transform.quantizer import fake_quantize_tokens
from graftwork.transform.scheme import ActivationScheme, KVScheme
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

IDS = torch.arange(3, 15)[None]


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def qkv(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, heads, 5, 8, generator=source).to(dtype) for heads in (4, 2, 2))  # pyright: ignore[reportReturnType]


def asymmetric(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounding of each slice of the last axis (compression protocol, section 4), in float64."""
    x = x.double()
    high, low = x.amax(-1, keepdim=True).clamp(min=0), x.amin(-1, keepdim=True).clamp(max=0)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return scale * ((x / scale + zero).round().clamp(0, 2**bits - 1) - zero)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_token_of_each_head_is_rounded_by_itself(bits: int) -> None:
    query, key, value = qkv()
    same, keys, values = round_kv(query, key, value, KVScheme(bits=bits))
    assert torch.equal(same, query)
    assert torch.allclose(keys.double(), asymmetric(key, bits), atol=1e-5)
    assert torch.allclose(values.double(), asymmetric(value, bits), atol=1e-5)


def test_rotated_keys_meet_rotated_queries() -> None:
    query, key, value = qkv()
    turned, keys, _ = round_kv(query, key, value, KVScheme(bits=4, rotate_keys=True))
    matrix = hadamard_matrix(8)
    assert torch.allclose(turned.double(), query.double() @ matrix, atol=1e-5)
    assert torch.allclose(keys.double(), asymmetric(key.double() @ matrix, 4), atol=1e-5)
    fine = round_kv(query, key, value, KVScheme(bits=8, rotate_keys=True))
    exact = query @ key.repeat_interleave(2, 1).mT
    assert torch.allclose(fine[0] @ fine[1].repeat_interleave(2, 1).mT, exact, atol=0.05)


@pytest.mark.parametrize("inner", ["sdpa", "eager"])
@pytest.mark.parametrize("rotate", [False, True])
def test_attention_is_that_of_the_rounded_keys_and_values(inner: str, rotate: bool) -> None:
    """One layer by hand: its attention with rounded keys and values equals what the model computes."""
    model = tiny_model("llama", num_hidden_layers=1, attn_implementation=inner)
    scheme = KVScheme(bits=3, rotate_keys=rotate)
    seen: dict[str, torch.Tensor] = {}
    layer = model.model.layers[0].self_attn
    layer.o_proj.register_forward_pre_hook(lambda module, args: seen.update(o=args[0].detach()))
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(
            x=kwargs["hidden_states"], cos=kwargs["position_embeddings"][0]
        ),
        with_kwargs=True,
    )
    plain = logits(model)
    set_kv(model, scheme)
    rounded = logits(model)
    assert not torch.allclose(plain, rounded, atol=1e-5)

    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    with torch.no_grad():
        x = seen["x"]
        heads = [
            getattr(layer, name)(x).unflatten(-1, (-1, 8)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        ]
        cos, sin = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
        query, key = apply_rotary_pos_emb(heads[0], heads[1], cos, sin)
        value = heads[2]
        if rotate:
            matrix = hadamard_matrix(8).float()
            query, key = query @ matrix, key @ matrix
        key, value = (asymmetric(part, 3).float().repeat_interleave(2, 1) for part in (key, value))
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.allclose(seen["o"], out.transpose(1, 2).flatten(2), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gpt2"])
def test_nothing_rounded_is_nothing_changed(kind: str) -> None:
    model = tiny_model(kind)
    plain = logits(model)
    set_kv(model, KVScheme(bits=16))
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), plain)
    set_kv(model, KVScheme(bits=8))
    assert torch.allclose(logits(model), plain, atol=0.02)
    assert not torch.equal(logits(model), plain)
    set_kv(model, None)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("rotate", [False, True])
def test_a_cache_gives_the_same_as_the_whole_sequence(rotate: bool) -> None:
    """Keys are rounded at each call; one scale per token makes that the same as rounding when they are stored."""
    model = tiny_model("llama")
    set_kv(model, KVScheme(bits=4, rotate_keys=rotate))
    whole = logits(model)
    with torch.no_grad():
        first = model(IDS[:, :5], use_cache=True)
        steps = [first.logits]
        cache = first.past_key_values
        for position in range(5, IDS.shape[1]):
            out = model(IDS[:, position : position + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits)
            cache = out.past_key_values
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)


def test_rounding_when_stored_is_rounding_at_each_call() -> None:
    """Numbers that were rounded token by token are the same, however many tokens are rounded together."""
    _, key, value = qkv()
    scheme = KVScheme(bits=4)
    _, keys, values = round_kv(key, key, value, scheme)
    for token in range(key.shape[2]):
        one = slice(token, token + 1)
        _, stored, held = round_kv(key, key[:, :, one], value[:, :, one], scheme)
        assert torch.equal(stored, keys[:, :, one])
        assert torch.equal(held, values[:, :, one])


def test_generate_works_and_pads() -> None:
    model = tiny_model("llama")
    set_kv(model, KVScheme(bits=4))
    ids = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
    mask = (ids != 0).long()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    alone = model.generate(ids[:1, 2:], max_new_tokens=4, do_sample=False, eos_token_id=None)
    again = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False
    )
    assert torch.equal(out[0, 2:], alone[0])
    assert torch.equal(out, again)


def test_the_half_precisions_keep_their_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        query, key, value = qkv(dtype)
        for rotate in (False, True):
            parts = round_kv(query, key, value, KVScheme(bits=4, rotate_keys=rotate))
            assert [part.dtype for part in parts] == [dtype] * 3
        assert torch.equal(parts[2], fake_quantize_tokens(value, ActivationScheme(bits=4)))


def test_names_lead_back() -> None:
    name = kv_attention(KVScheme(bits=3, rotate_keys=True), "eager")
    assert plain_attention(name) == "eager"
    assert kv_attention(KVScheme(bits=16), name) == "eager"
    assert kv_attention(KVScheme(bits=4), name) == kv_attention(KVScheme(bits=4), "eager") != name
    assert plain_attention("flash_attention_2") == "flash_attention_2"
    with pytest.raises(
        UserError, match="the model uses 'flash_attention_2'; pass attn_implementation='sdpa'"
    ):
        kv_attention(KVScheme(bits=4), "flash_attention_2")


def built(kind: str, **fields: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = AutoConfig.for_model(kind, vocab_size=64, **sizes, **fields)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_norms_of_queries_and_keys_refuse_the_rotation() -> None:
    model = built("qwen3", num_key_value_heads=2, head_dim=8)
    check_kv(model, KVScheme(bits=4))
    with pytest.raises(UserError, match=r"'model.layers.0.self_attn.q_norm' normalises queries and keys"):
        check_kv(model, KVScheme(bits=4, rotate_keys=True))


def test_partial_positions_refuse_the_rotation() -> None:
    model = built(
        "gpt_neox", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    )
    check_kv(model, KVScheme(bits=4))
    with pytest.raises(UserError, match=r"attention' gives a position to 25% of each head only"):
        check_kv(model, KVScheme(bits=4, rotate_keys=True))
    check_kv(built("llama"), KVScheme(bits=4, rotate_keys=True))


def test_latent_caches_are_refused() -> None:
    model = tiny_model("llama")
    model.config.kv_lora_rank = 4
    with pytest.raises(UserError, match="holds latents"):
        check_kv(model, KVScheme(bits=4))
    check_kv(model, KVScheme(bits=16))


def test_attention_out_of_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(UserError, match="not reached through transformers' AttentionInterface"):
        set_kv(model, KVScheme(bits=4))
