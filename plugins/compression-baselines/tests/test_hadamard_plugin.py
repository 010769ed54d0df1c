"""Rotations change no logit before anything is rounded, come back between layers, and spread outliers."""

import pytest
import torch
from graftwork import UserError
from graftwork.transform.figures import flatness
from graftwork.transform.hadamard import hadamard_matrix
from graftwork_compression_baselines.rotating import make_rotation, turned, turned_back
from transformers import Gemma2Config, GemmaConfig, StableLmConfig

BOTH = pytest.mark.parametrize("place", ["residual", "online"])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_rotations_leave_no_trace_in_the_logits(place, dtype, kind, tied, rough, stream):
    model = rough(kind, dtype=dtype, tie_word_embeddings=tied)
    outcome = stream(model, ("hadamard", {"place": place}))
    # Hidden states between layers are turned back before they are compared.
    assert max(layer.error for layer in outcome.layers) < (1e-10 if dtype == torch.float32 else 1e-12)
    assert outcome.nll == pytest.approx(outcome.dense_nll, abs=1e-5)
    assert outcome.config.tie_word_embeddings == (tied and place == "online")


@BOTH
def test_rotated_models_load_and_give_the_same_logits(place, rough, job, logits):
    model = rough("qwen2", tie_word_embeddings=True)
    loaded, result, _ = job(model, {"hadamard": {"place": place}})
    assert (logits(loaded) - logits(model)).abs().max() < 1e-4
    assert abs(result["metrics"]["delta_nll"]) < 1e-5


def test_the_residual_stream_is_turned_where_it_is_written_and_read(rough, job):
    model = rough()
    loaded, result, _ = job(model, {"hadamard": {}})
    rotation = make_rotation(32, result["seed"], "auto", "x")
    turn = torch.diag(rotation.signs.double()) @ hadamard_matrix(32)
    old, new = model.model.layers[0], loaded.model.layers[0]
    embedded = model.model.embed_tokens.weight.double() @ turn
    torch.testing.assert_close(loaded.model.embed_tokens.weight.double(), embedded, rtol=1e-4, atol=1e-6)
    read = (old.self_attn.q_proj.weight * old.input_layernorm.weight).double() @ turn
    torch.testing.assert_close(new.self_attn.q_proj.weight.double(), read, rtol=1e-4, atol=1e-5)
    head = (model.lm_head.weight * model.model.norm.weight).double() @ turn
    torch.testing.assert_close(loaded.lm_head.weight.double(), head, rtol=1e-4, atol=1e-5)
    heads = torch.block_diag(*[hadamard_matrix(8)] * 4)
    written = turn.T @ old.self_attn.o_proj.weight.double() @ heads
    torch.testing.assert_close(new.self_attn.o_proj.weight.double(), written, rtol=1e-4, atol=1e-5)
    values = torch.block_diag(*[hadamard_matrix(8)] * 2).T @ (
        old.self_attn.v_proj.weight * old.input_layernorm.weight
    ).double() @ turn  # fmt: skip
    torch.testing.assert_close(new.self_attn.v_proj.weight.double(), values, rtol=1e-4, atol=1e-5)
    for norm in (new.input_layernorm, new.post_attention_layernorm, loaded.model.norm):
        assert torch.equal(norm.weight, torch.ones(32))
    # Only down turns its input at run time.
    turning = [name for name, module in new.named_modules() if getattr(module, "rotation", None) is not None]
    assert turning == ["mlp.down_proj"]


def test_online_every_linear_turns_its_input(rough, layers):
    model = rough()
    new = layers(model, ("hadamard", {"place": "online"}))[1]
    old = model.model.layers[1]
    for name, module in old.named_modules():
        if isinstance(module, torch.nn.Linear):
            linear = new.get_submodule(name)
            turn = torch.diag(linear.rotation.signs.double()) @ hadamard_matrix(module.in_features)
            torch.testing.assert_close(
                linear.weight.double(), module.weight.double() @ turn, rtol=1e-4, atol=1e-5
            )
    assert torch.equal(new.self_attn.q_proj.rotation_signs, new.mlp.up_proj.rotation_signs)
    assert torch.equal(new.input_layernorm.weight, old.input_layernorm.weight)


@BOTH
def test_outliers_are_spread_and_few_bits_do_better(place, rough, stream):
    model = rough()
    outcome = stream(model, ("hadamard", {"place": place}))
    assert outcome.layers[0].inputs_flatness[1] < 0.5 * outcome.layers[0].inputs_flatness[0]
    plain = stream(model, ("rtn", {"scheme": "W8A4"})).layers[0].error
    turned_first = stream(model, ("hadamard", {"place": place}), ("rtn", {"scheme": "W8A4"})).layers[0].error
    assert turned_first < 0.7 * plain


def test_a_rotation_spreads_a_spike_and_comes_back():
    rotation = make_rotation(48, 5, "auto", "x")
    spike = torch.zeros(2, 48, dtype=torch.float64)
    spike[:, 7] = 3
    assert flatness(spike[0]) == pytest.approx(1)
    assert flatness(turned(rotation, spike)[0]) == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(turned_back(rotation, turned(rotation, spike)), spike)
    assert not torch.equal(make_rotation(48, 6, "auto", "x").signs, rotation.signs)


def test_the_seed_decides_the_signs(rough, layers):
    model = rough()
    for place in ("residual", "online"):
        one, same, else_ = (
            layers(model, ("hadamard", {"place": place}), seed=seed)[0].mlp.down_proj for seed in (1, 1, 2)
        )
        assert torch.equal(one.rotation_signs, same.rotation_signs)
        assert torch.equal(one.weight, same.weight)
        assert not torch.equal(one.rotation_signs, else_.rotation_signs)


def test_norms_of_other_kinds(other, stream):
    gemma = other(GemmaConfig, head_dim=8, num_key_value_heads=2)
    outcome = stream(gemma, ("hadamard", {}))
    assert outcome.nll == pytest.approx(outcome.dense_nll, abs=1e-5)
    assert max(layer.error for layer in outcome.layers) < 1e-9

    centred = other(StableLmConfig, num_key_value_heads=4)
    with pytest.raises(UserError, match="the final norm takes the mean away or adds a bias"):
        stream(centred, ("hadamard", {}))
    behind = other(Gemma2Config, head_dim=8, num_key_value_heads=2)
    with pytest.raises(UserError, match=r"'model.layers.0.post_\w+' stands behind attention or MLP"):
        stream(behind, ("hadamard", {}))
    for model in (centred, behind):
        outcome = stream(model, ("hadamard", {"place": "online"}))
        assert outcome.nll == pytest.approx(outcome.dense_nll, abs=1e-5)


@BOTH
def test_sizes_of_blocks(place, rough, stream):
    model = rough()
    outcome = stream(model, ("hadamard", {"place": place, "block": 8}))
    assert outcome.nll == pytest.approx(outcome.dense_nll, abs=1e-5)
    with pytest.raises(UserError, match=r"block = 6 gives no rotation of the 32 channels of .*, 32 at most"):
        stream(model, ("hadamard", {"place": place, "block": 6}))
    odd = rough(intermediate_size=46)
    with pytest.raises(
        UserError, match=r"the 46 channels of 'model.layers.0.mlp.down_proj' have no .* of order 2;"
    ):
        stream(odd, ("hadamard", {"place": place}))
    outcome = stream(odd, ("hadamard", {"place": place, "block": 2}))
    assert outcome.nll == pytest.approx(outcome.dense_nll, abs=1e-5)


def test_turning_twice_is_refused(rough, stream):
    online = ("hadamard", {"place": "online"})
    with pytest.raises(UserError, match=r"'model.layers.0.self_attn.q_proj' rotates its inputs"):
        stream(rough(), online, online)


@BOTH
def test_factors_are_turned_in_the_place_of_their_weight(place, rough, stream):
    model = rough(num_key_value_heads=4)
    # Full rank here: the rank has a Hadamard matrix.
    thin = stream(model, ("svd", {"whiten": "none", "ratio": 0.76}))
    both = stream(
        model, ("svd", {"whiten": "none", "ratio": 0.76}), ("hadamard", {"place": place, "block": 2})
    )
    assert both.nll == pytest.approx(thin.nll, abs=1e-4)
