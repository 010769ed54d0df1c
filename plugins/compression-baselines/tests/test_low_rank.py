"""SVD, ASVD, SVD-LLM and LQER: which error each makes least, and where the limits are exact."""

import pytest
import torch
from graftwork import UserError
from graftwork.transform.feedback import output_error
from graftwork.transform.modules import CompressedLinear, Factored
from graftwork.transform.quantizer import quantize_weight
from graftwork.transform.scheme import WeightScheme
from graftwork_compression_baselines.lqer import l2qer_scales, rounded_factor
from graftwork_compression_baselines.svd import factors

ALL = [
    *(f"self_attn.{one}_proj" for one in "qkvo"),
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]
MHA = {"num_key_value_heads": 4}


def best(weight, rank):
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


# ---------------------------------------------------------------------- factors


def test_both_factors_carry_the_same_weight():
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, right = factors(weight, 4, None, "x")
    torch.testing.assert_close(left.T @ left, right @ right.T)
    torch.testing.assert_close(left @ right, best(weight, 4))


def test_each_metric_makes_its_own_error_least(rough, layers, inputs):
    model = rough(dtype=torch.float64)
    old = model.model.layers[0]
    x = inputs(model, 0, ALL)
    made = {whiten: layers(model, ("svd", {"whiten": whiten}))[0] for whiten in ("none", "asvd", "cholesky")}
    for name in ALL:
        weight, moments = old.get_submodule(name).weight.detach(), x[name].T @ x[name]
        scale = x[name].abs().mean(0).sqrt()
        errors = {}
        for whiten, layer in made.items():
            linear = layer.get_submodule(name)
            assert isinstance(linear, Factored)
            assert linear.rank == int(0.8 * weight.numel() / sum(weight.shape))
            wrong = weight - linear.dense_weight()
            errors[whiten] = {
                "none": wrong.square().sum().item(),
                "asvd": (wrong * scale).square().sum().item(),
                "cholesky": output_error(wrong, moments),
            }
        for metric in made:
            least = min(made, key=lambda whiten: errors[whiten][metric])
            assert errors[metric][metric] <= errors[least][metric] * (1 + 1e-6), (name, metric)
        torch.testing.assert_close(made["none"].get_submodule(name).dense_weight(), best(weight, linear.rank))
        asvd = best(weight * scale, linear.rank) / scale
        torch.testing.assert_close(made["asvd"].get_submodule(name).dense_weight(), asvd)


def test_the_error_of_outputs_is_the_energy_that_was_cut_off(rough, stream, inputs):
    model = rough(dtype=torch.float64)
    records = stream(model, ("svd", {})).layers[0].linears
    for name, x in inputs(model, 0, ALL).items():
        weight = model.model.layers[0].get_submodule(name).weight.detach()
        values = torch.linalg.svdvals(weight @ torch.linalg.cholesky(x.T @ x)).square()
        rank = records[name]["low_rank"]
        assert records[name]["low_rank_error"] == pytest.approx(
            (values[rank:].sum() / values.sum()).item(), rel=1e-4
        )


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("whiten", ["none", "asvd", "cholesky"])
def test_factored_models_load(whiten, kind, rough, job):
    loaded, result, windows = job(rough(kind), {"svd": {"whiten": whiten, "ratio": 0.7}})
    with torch.no_grad():
        scores = loaded(input_ids=windows).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(scores.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert result["metrics"]["nll"] == pytest.approx(nll, abs=1e-4)
    assert result["metrics"]["bits_per_weight"] < 0.75 * 32


def test_rotations_do_not_change_the_best_factors(rough, stream, layers):
    model = rough(dtype=torch.float64)
    plain = stream(model, ("svd", {}))
    turned = stream(model, ("hadamard", {"place": "online"}), ("svd", {}))
    assert turned.nll == pytest.approx(plain.nll, abs=1e-4)
    for one, other in zip(plain.layers, turned.layers, strict=True):
        for name in ALL:
            error = other.linears[name]["low_rank_error"]
            assert one.linears[name]["low_rank_error"] == pytest.approx(error, rel=1e-4)


def test_rounding_afterwards_rounds_both_factors_and_what_flows_between(rough, layers):
    model = rough()
    plain = layers(model, ("svd", {}))[0]
    rounded = layers(model, ("svd", {}), ("rtn", {"scheme": "W4A8"}))[0]
    for name in ALL:
        for part in ("0", "1"):
            linear = rounded.get_submodule(f"{name}.{part}")
            weight = plain.get_submodule(f"{name}.{part}").weight
            assert torch.equal(linear.codes().codes, quantize_weight(weight, WeightScheme(bits=4)).codes)
            assert linear.activations.bits == 8


def test_what_cannot_be_factored_is_refused(rough, stream):
    with pytest.raises(UserError, match=r"'model.layers.0.self_attn.\w_proj' is factorised already"):
        stream(rough(), ("svd", {}), ("svd", {}))
    with pytest.raises(
        UserError, match=r"ratio 0.05 leaves 'model.layers.0.self_attn.\w_proj' .* a rank of 0"
    ):
        stream(rough(), ("svd", {"ratio": 0.05}))
    with pytest.raises(UserError, match="no linear left to change"):
        stream(rough(), ("rtn", {}), ("svd", {}))


# ---------------------------------------------------------------------- corrections


def corrected(linear):
    left, right = linear.correction
    return linear.dense_weight().double() + left.double() @ right.double()


def test_plain_correction_is_the_best_of_the_weights_error(rough, layers):
    model = rough(dtype=torch.float64)
    new = layers(model, ("lqer", {"scheme": "W3A16", "rank": 5, "scale": "none"}))[1]
    for name in ALL:
        weight = model.model.layers[1].get_submodule(name).weight.detach()
        linear = new.get_submodule(name)
        assert isinstance(linear, CompressedLinear)
        rounded = quantize_weight(weight, WeightScheme(bits=3)).dequantized()
        assert torch.equal(linear.dense_weight(), rounded)
        torch.testing.assert_close(corrected(linear), rounded + best(weight - rounded, 5))


def test_scaled_correction_is_the_best_of_the_scaled_error(rough, layers, inputs, ids):
    model = rough(dtype=torch.float64)
    new = layers(model, ("lqer", {"scheme": "W3A16", "rank": 5, "scale": "l2qer"}))[0]
    name = "self_attn.q_proj"
    # Batches of two windows.
    x = inputs(model, 0, [name])[name].reshape(2, 48, 32).abs().mean(1)
    scale = l2qer_scales(x.amax(0))
    weight = model.model.layers[0].get_submodule(name).weight.detach()
    rounded = quantize_weight(weight, WeightScheme(bits=3)).dequantized()
    torch.testing.assert_close(
        corrected(new.get_submodule(name)), rounded + best((weight - rounded) * scale, 5) / scale,
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_exact_correction_is_the_best_for_outputs(rough, layers, inputs, stream):
    model = rough(dtype=torch.float64)
    name = "self_attn.v_proj"
    new = {
        scale: layers(model, ("lqer", {"scheme": "W3A16", "rank": 5, "scale": scale}))[0].get_submodule(name)
        for scale in ("none", "l2qer", "exact")
    }
    x = inputs(model, 0, [name])[name]
    weight = model.model.layers[0].get_submodule(name).weight.detach()
    errors = {scale: output_error(weight - corrected(linear), x.T @ x) for scale, linear in new.items()}
    assert errors["exact"] == min(errors.values())
    # QERA's own form: the symmetric root of the autocorrelation.
    values, vectors = torch.linalg.eigh(x.T @ x)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    rounded = new["exact"].dense_weight()
    expected = best((weight - rounded) @ root, 5) @ torch.linalg.inv(root)
    torch.testing.assert_close(corrected(new["exact"]), rounded + expected, rtol=1e-4, atol=1e-4)
    record = stream(model, ("lqer", {"scheme": "W3A16", "rank": 5})).layers[0].linears[name]
    assert record["corrected_error"] == pytest.approx(
        errors["exact"] / output_error(weight, x.T @ x), rel=1e-3
    )
    assert record["corrected_error"] < record["output_error"]


@pytest.mark.parametrize("before", [[], [("hadamard", {"place": "online"})]], ids=["plain", "rotated"])
@pytest.mark.parametrize("scale", ["none", "l2qer", "exact"])
@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_a_correction_of_full_rank_gives_the_plain_model_back(before, scale, quantizer, rough, stream):
    model = rough(**MHA)
    options = {"scheme": "W2A16", "rank": 32, "scale": scale, "quantizer": quantizer}
    outcome = stream(model, *before, ("lqer", options))
    assert max(layer.error for layer in outcome.layers) < 1e-6
    assert outcome.nll == pytest.approx(outcome.dense_nll, abs=1e-4)


def test_corrections_help_and_need_a_rank_that_is_there(rough, stream):
    model = rough()
    rounded = stream(model, ("rtn", {"scheme": "W2A16"})).layers[0].error
    helped = stream(model, ("lqer", {"scheme": "W2A16", "rank": 8})).layers[0].error
    assert helped < 0.5 * rounded
    with pytest.raises(
        UserError, match=r"rank = 40 is more than 'model.layers.0.self_attn.\w_proj' \(32 x 32\) has"
    ):
        stream(model, ("lqer", {"rank": 40}))


def test_scales_of_l2qer():
    sizes = torch.tensor([1.0, 4.0, 0.0])
    torch.testing.assert_close(l2qer_scales(sizes), torch.tensor([1.0, 4.0, 1e-4]).double() / (4e-4) ** 0.5)


def test_factors_are_rounded_per_row_and_kept_as_numbers(rough, layers):
    factor = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    scale = factor.abs().amax(1, True) / 127
    torch.testing.assert_close(rounded_factor(factor, 8), (factor / scale).round() * scale)
    assert rounded_factor(factor, 16) is factor
    model = rough()
    for bits, same in ((8, True), (16, False)):
        linear = layers(model, ("lqer", {"rank": 4, "factor_bits": bits}))[0].mlp.down_proj
        for part in linear.correction:
            assert torch.allclose(rounded_factor(part.detach(), 8), part, atol=1e-7) == same
