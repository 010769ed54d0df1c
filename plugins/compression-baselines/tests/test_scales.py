"""SmoothQuant and AWQ: the formulas, the searches by brute force, and that folding leaves no trace."""

import pytest
import torch
from graftwork import UserError
from graftwork.transform.quantizer import fake_quantize_weight, quantize_weight
from graftwork.transform.scheme import WeightScheme
from graftwork_compression_baselines.awq_search import (
    candidate,
    channel_weights,
    clipped,
    losses_by_moments,
    losses_by_output,
    rounded_under,
)
from graftwork_compression_baselines.smoothquant import smooth_scales
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GemmaConfig, StableLmConfig

EVERYWHERE = ["qkv", "o", "gate_up", "down"]
MHA = {"num_key_value_heads": 4}


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------- SmoothQuant


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), alpha=st.floats(0, 1))
def test_scales_share_the_difficulty(seed, alpha):
    x, w = numbers(seed, 8).abs() + 0.1, numbers(seed + 1, 8).abs() + 0.1
    s = smooth_scales(x, w, alpha)
    torch.testing.assert_close(s, x**alpha / w ** (1 - alpha))
    # What is left of inputs and what weights become are the same power of their product.
    torch.testing.assert_close(x / s, (x * w) ** (1 - alpha))
    torch.testing.assert_close(w * s, (x * w) ** alpha)


def test_inputs_and_weights_that_are_zero_leave_scales_finite():
    s = smooth_scales(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]), 0.5)
    assert torch.isfinite(s).all()
    assert (s >= 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("smoothquant", {}),
        ("smoothquant", {"alpha": 0.8, "places": EVERYWHERE}),
        ("smoothquant", {"measure": "range", "places": ["down", "o"]}),
        ("awq", {"quantizer": "none", "group": 8}),
        ("awq", {"quantizer": "none", "duo": False}),
    ],
)
def test_folding_leaves_no_trace_in_the_logits(name, options, kind, dtype, rough, stream):
    outcome = stream(rough(kind, dtype=dtype), (name, options))
    assert max(layer.error for layer in outcome.layers) < (1e-10 if dtype == torch.float32 else 1e-24)
    assert outcome.nll == pytest.approx(outcome.dense_nll, abs=1e-5)


def test_folded_models_load_and_give_the_same_logits(rough, job, logits):
    model = rough("qwen2")
    for plugins in (
        {"smoothquant": {"places": EVERYWHERE}},
        {"awq": {"quantizer": "none"}},
    ):
        loaded, result, _ = job(model, plugins)
        assert (logits(loaded) - logits(model)).abs().max() < 1e-4
        assert result["metrics"]["bits_per_weight"] == pytest.approx(32, abs=2)


@pytest.mark.parametrize(
    ("config", "changes"),
    # Norms that multiply with one more than their weight; norms that take the mean away.
    [
        (GemmaConfig, {"head_dim": 8, "num_key_value_heads": 2}),
        (StableLmConfig, {"use_qkv_bias": True, "num_key_value_heads": 4}),
    ],
)
def test_other_norms_are_understood(config, changes, other, stream):
    model = other(config, **changes)
    before = model.model.layers[0].input_layernorm.weight.detach().clone()
    for name in ("smoothquant", "awq"):
        options = {"places": EVERYWHERE, **({"quantizer": "none"} if name == "awq" else {})}
        outcome = stream(model, (name, options))
        assert max(layer.error for layer in outcome.layers) < 1e-9
    assert torch.equal(model.model.layers[0].input_layernorm.weight, before)


def test_scales_are_those_of_the_inputs_and_all_weights_of_a_place(rough, layers, inputs):
    model = rough(dtype=torch.float64)
    new = layers(model, ("smoothquant", {"alpha": 0.6, "places": EVERYWHERE}))[0]
    old = model.model.layers[0]
    x = inputs(model, 0, ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    w = torch.cat([old.get_submodule(name).weight for name in names]).abs().amax(0)
    s = smooth_scales(x["self_attn.q_proj"].abs().amax(0), w, 0.6)
    torch.testing.assert_close(new.input_layernorm.weight, old.input_layernorm.weight / s)
    torch.testing.assert_close(new.self_attn.q_proj.weight, old.self_attn.q_proj.weight * s)
    # Two query heads read one value head: they share its scale, the one for the larger of both.
    reads = x["self_attn.o_proj"].abs().amax(0).reshape(2, 2, 8).amax(1)
    columns = old.self_attn.o_proj.weight.abs().amax(0).reshape(2, 2, 8).amax(1)
    shared = smooth_scales(reads, columns, 0.6)
    torch.testing.assert_close(
        new.self_attn.o_proj.weight,
        old.self_attn.o_proj.weight * shared[:, None].expand(2, 2, 8).reshape(-1),
    )
    torch.testing.assert_close(
        new.self_attn.v_proj.weight, old.self_attn.v_proj.weight * s / shared.reshape(-1, 1)
    )
    down = smooth_scales(x["mlp.down_proj"].abs().amax(0), old.mlp.down_proj.weight.abs().amax(0), 0.6)
    torch.testing.assert_close(new.mlp.down_proj.weight, old.mlp.down_proj.weight * down)


def test_ranges_are_measured_as_llm_compressor_does(rough, layers, inputs):
    model = rough(dtype=torch.float64)
    new = layers(model, ("smoothquant", {"measure": "range", "places": ["gate_up"]}))[1].mlp
    changed = layers(model, ("rtn", {"scheme": "W16A16"}))[1]
    x = inputs(model, 1, ["mlp.gate_proj"])["mlp.gate_proj"]
    w = torch.cat([changed.mlp.gate_proj.weight, changed.mlp.up_proj.weight]).abs().amax(0)
    s = ((x.amax(0) - x.amin(0)) / (2 * w)).sqrt()
    torch.testing.assert_close(new.gate_proj.weight, changed.mlp.gate_proj.weight * s)


def test_smoothing_makes_few_bit_activations_better(rough, stream):
    model = rough()
    plain = stream(model, ("rtn", {"scheme": "W8A4"})).layers[0].error
    smooth = stream(model, ("smoothquant", {}), ("rtn", {"scheme": "W8A4"})).layers[0].error
    assert smooth < 0.7 * plain


def test_scales_come_before_rotations_and_rounding(rough, stream):
    with pytest.raises(UserError, match=r"q_proj' rotates its inputs, so 'smoothquant' cannot scale"):
        stream(rough(), ("hadamard", {"place": "online"}), ("smoothquant", {}))
    with pytest.raises(UserError, match=r"q_proj' is rounded already, so 'smoothquant' cannot change it"):
        stream(rough(), ("rtn", {}), ("smoothquant", {}))


def test_factors_are_scaled_in_the_place_of_their_weight(rough, stream):
    model = rough()
    thin = stream(model, ("svd", {"whiten": "none"}))
    for name, options in (
        ("smoothquant", {"places": EVERYWHERE}),
        ("awq", {"quantizer": "none"}),
    ):
        scaled = stream(model, ("svd", {"whiten": "none"}), (name, options))
        assert scaled.nll == pytest.approx(thin.nll, abs=1e-5)


# ---------------------------------------------------------------------- AWQ


def test_candidates_are_those_of_the_formula():
    x, w = numbers(0, 6).abs(), numbers(1, 6).abs()
    raw = (x**0.35 / (w**0.65 + 1e-4)).clamp(min=1e-4)
    torch.testing.assert_close(candidate(x, w, 0.35), raw / (raw.max() * raw.min()).sqrt())
    torch.testing.assert_close(candidate(x, None, 0), torch.ones(6, dtype=torch.float64))
    s = candidate(x, None, 0.8)
    assert (s.max() * s.min()).item() == pytest.approx(1)


def test_weights_of_channels_are_means_of_shares_of_their_group():
    weights = [numbers(0, 3, 4), numbers(1, 2, 4)]
    stacked = torch.cat(weights).abs()
    shares = [stacked[:, :2] / stacked[:, :2].amax(1, True), stacked[:, 2:] / stacked[:, 2:].amax(1, True)]
    torch.testing.assert_close(
        channel_weights(weights, 2), torch.cat(shares, 1).mean(0), rtol=1e-5, atol=1e-5
    )


def test_rounding_under_scales_undoes_them():
    weight, s = numbers(0, 5, 8), numbers(1, 8).abs() + 0.5
    scheme = WeightScheme(bits=3, group=4)
    torch.testing.assert_close(
        rounded_under(weight, s, scheme), quantize_weight(weight * s, scheme).dequantized() / s
    )
    fine = rounded_under(weight, s, WeightScheme(bits=16))
    torch.testing.assert_close(fine, weight)


def test_losses_are_those_of_the_outputs(rough, stream, layers, inputs):
    model = rough(dtype=torch.float64)
    scheme = WeightScheme(bits=3)
    scales = [candidate(numbers(2, 32).abs(), None, ratio) for ratio in (0.0, 0.5)]
    found = {}

    def look(block):
        if block.index:
            return
        linears = {name: block.get(f"mlp.{name}").weight for name in ("gate_proj", "up_proj")}
        before = {name: weight.clone() for name, weight in linears.items()}
        found["mlp"] = losses_by_output(block, "mlp", linears, scales, scheme, None)
        assert all(torch.equal(linears[name], before[name]) for name in linears)
        moments = block.second_moments("self_attn.o_proj")["self_attn.o_proj"]
        found["o"] = losses_by_moments(block.get("self_attn.o_proj").weight, moments, scales, scheme)

    stream(model, look=look)
    mlp, o = model.model.layers[0].mlp, model.model.layers[0].self_attn.o_proj
    x = inputs(model, 0, ["mlp.gate_proj", "self_attn.o_proj"])
    reference = mlp(x["mlp.gate_proj"])
    kept = mlp.gate_proj.weight.data.clone(), mlp.up_proj.weight.data.clone()
    for number, s in enumerate(scales):
        wrong = rounded_under(o.weight.detach(), s, scheme) - o.weight
        assert found["o"][number] == pytest.approx(
            (x["self_attn.o_proj"] @ wrong.T).square().sum().item(), rel=1e-4
        )
        mlp.gate_proj.weight.data = rounded_under(kept[0], s, scheme)
        mlp.up_proj.weight.data = rounded_under(kept[1], s, scheme)
        loss = (mlp(x["mlp.gate_proj"]) - reference).square().mean().item()
        assert found["mlp"][number] == pytest.approx(loss, rel=1e-4)
        mlp.gate_proj.weight.data, mlp.up_proj.weight.data = kept


def test_the_search_takes_the_exponent_with_the_least_loss(rough, stream, inputs):
    model = rough(dtype=torch.float64)
    scheme = WeightScheme(bits=3, group=8)
    outcome = stream(model, ("awq", {"scheme": "W3A16", "group": 8, "quantizer": "none", "places": ["down"]}))
    record = outcome.layers[0].linears["mlp.down_proj"]
    x = inputs(model, 0, ["mlp.down_proj"])["mlp.down_proj"]
    weight = model.model.layers[0].mlp.down_proj.weight.detach()
    losses = []
    for step in range(20):
        s = candidate(x.abs().mean(0), channel_weights([weight], 8), step / 20)
        losses.append((x @ (rounded_under(weight, s, scheme) - weight).T).square().sum().item())
    best = min(range(20), key=losses.__getitem__)
    assert record["awq_exponent"] == best / 20
    plain = (x @ (fake_quantize_weight(weight, scheme) - weight).T).square().sum().item()
    assert record["awq_loss"] == pytest.approx(losses[best] / plain, rel=1e-4)


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_takes_the_share_with_the_least_output_error_of_a_group(group, symmetric):
    scheme = WeightScheme(bits=2, group=group, symmetric=symmetric)
    weight, x = numbers(0, 7, 12), numbers(1, 40, 12) @ numbers(2, 12, 12)
    size = group or 12
    expected = weight.clone()
    for row in range(7):
        for start in range(0, 12, size):
            part, seen = weight[row, start : start + size], x[:, start : start + size]
            best = torch.inf
            for step in range(10):
                limit = part.abs().max() * (1 - step / 20)
                tried = part.clamp(-limit, limit)
                whole = WeightScheme(bits=2, symmetric=symmetric)
                error = (seen @ (fake_quantize_weight(tried[None], whole)[0] - part)).square().sum().item()
                if error < best * (1 - 1e-6):
                    best, expected[row, start : start + size] = error, tried
    torch.testing.assert_close(clipped(weight, x.T @ x, scheme, rows=3), expected)


def test_queries_and_keys_are_not_clipped(rough, layers):
    model = rough(dtype=torch.float64, **MHA)
    options = {"scheme": "W2A16", "places": ["down"]}
    free, clip = (layers(model, ("awq", {**options, "search_clip": on}))[0] for on in (False, True))
    same = {
        name: torch.equal(free.get_submodule(name).weight_scale, clip.get_submodule(name).weight_scale)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj")
    }
    assert same == {
        "self_attn.q_proj": True,
        "self_attn.k_proj": True,
        "self_attn.v_proj": False,
        "mlp.gate_proj": False,
    }


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_awq_outputs_are_nearer_than_those_of_plain_rounding(quantizer, rough, stream):
    model = rough()
    options = {"scheme": "W3A16", "group": 8}
    plain = stream(model, (quantizer, options)).layers[0].error
    scaled = stream(model, ("awq", {**options, "quantizer": quantizer})).layers[0].error
    assert scaled < 0.9 * plain


def test_the_search_may_look_at_fewer_batches(rough, stream):
    model = rough()
    options = {"scheme": "W3A16", "quantizer": "none", "places": ["qkv"]}
    one = stream(model, ("awq", {**options, "search_batches": 1})).layers[0].linears["self_attn.q_proj"]
    both = stream(model, ("awq", {**options, "search_batches": 2})).layers[0].linears["self_attn.q_proj"]
    every = stream(model, ("awq", options)).layers[0].linears["self_attn.q_proj"]
    assert both == every
    assert one["awq_loss"] != every["awq_loss"]
