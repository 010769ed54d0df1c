"""Scales, codes and values against the formulas in float64, and bit for bit against compressed-tensors."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from graftwork import UserError
from graftwork.transform.quantizer import (
    Quantized,
    fake_quantize_tokens,
    fake_quantize_weight,
    quantize_weight,
    quantize_with,
    round_ste,
    weight_scales,
)
from graftwork.transform.scheme import ActivationScheme, WeightScheme
from hypothesis import given, settings
from hypothesis import strategies as st

BITS = [2, 3, 4, 5, 6, 7, 8]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(seed, rows=6, columns=24, dtype=torch.float32):
    """A weight with rows of very different size, an outlier and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows)[:, None]
    weight[0, 0] = 5 * weight[0].abs().max()
    weight[-1] = 0
    return weight.to(dtype)


def reference(weight, scheme):
    """Section by section the formulas, in float64: (codes, values)."""
    w = weight.double()
    w = w.reshape(w.shape[0], -1, scheme.group or w.shape[1])
    bits, least, largest = scheme.bits, -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    if scheme.symmetric:
        a = w.abs().amax(-1, keepdim=True)
        s = a / (largest if scheme.convention == "largest-level" else (2**bits - 1) / 2)
        s = torch.where(s == 0, torch.ones_like(s), s)
        z = torch.zeros_like(s)
    else:
        hi, lo = w.amax(-1, keepdim=True).clamp(min=0), w.amin(-1, keepdim=True).clamp(max=0)
        empty = hi == lo
        hi, lo = torch.where(empty, 1.0, hi), torch.where(empty, -1.0, lo)
        s = (hi - lo) / (2**bits - 1)
        z = (least - lo / s).clamp(least, largest).round()
    q = (w / s + z).clamp(least, largest).round()
    return q.flatten(1), ((q - z) * s).flatten(1)


schemes = st.builds(
    WeightScheme,
    bits=st.sampled_from(BITS),
    group=st.sampled_from([None, 4, 12]),
    symmetric=st.booleans(),
    convention=st.sampled_from(["largest-level", "half-range"]),
)


@settings(max_examples=60, deadline=None)
@given(scheme=schemes, seed=st.integers(0, 10_000))
def test_rounding_is_that_of_the_formula(scheme, seed):
    weight = draw(seed, dtype=torch.float64)
    codes, values = reference(weight, scheme)
    rounded = quantize_weight(weight, scheme)
    assert torch.equal(rounded.codes.double(), codes)
    torch.testing.assert_close(rounded.dequantized(), values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_largest_level_makes_the_largest_value_a_level_and_half_range_clamps_it(bits):
    weight = torch.tensor([[3.0, -1.0, 0.5, 0.0]])
    exact = quantize_weight(weight, WeightScheme(bits=bits))
    assert exact.codes[0, 0] == 2 ** (bits - 1) - 1
    torch.testing.assert_close(exact.dequantized()[0, 0], weight[0, 0])
    clamped = quantize_weight(weight, WeightScheme(bits=bits, convention="half-range"))
    torch.testing.assert_close(clamped.scale[0, 0], torch.tensor(3 / ((2**bits - 1) / 2)))
    assert clamped.codes[0, 0] == 2 ** (bits - 1) - 1
    assert clamped.dequantized()[0, 0] < 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_scales_codes_and_values_are_those_of_compressed_tensors(bits, symmetric, group, dtype):
    weight = draw(bits, dtype=dtype)
    # That library leaves the zero point of a row of zeros open.
    weight = weight if symmetric else weight[:-1]
    args = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="group" if group else "channel", group_size=group
    )
    grouped = weight.unflatten(1, (-1, group or weight.shape[1]))
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    codes = quantize(weight.float(), scale.float(), zero, args, dtype=torch.int8)
    values = dequantize(codes, scale, zero, args)

    ours = quantize_weight(
        weight, WeightScheme(bits=bits, group=group, symmetric=symmetric, convention="half-range")
    )
    assert ours.scale.dtype == dtype
    assert torch.equal(ours.scale, scale)
    if symmetric:
        assert ours.zero is None
    else:
        assert torch.equal(ours.zero, zero)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.dequantized(), values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_tokens_are_rounded_as_compressed_tensors_rounds_them(bits, symmetric, dtype):
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = draw(bits)[:-1].reshape(1, 5, 24).to(dtype)
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    theirs = fake_quantize(x, scale, zero, args)
    ours = fake_quantize_tokens(x, ActivationScheme(bits=bits, symmetric=symmetric, convention="half-range"))
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(scheme=schemes, seed=st.integers(0, 10_000), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_rounding_what_was_rounded_changes_nothing(scheme, seed, dtype):
    first = quantize_weight(draw(seed, dtype=dtype), scheme)
    again = quantize_with(first.dequantized(), first.scale, first.zero, scheme)
    # bfloat16 is wrong by up to 1/256 of a value, which is half a step from 128 steps on.
    zero = 0 if first.zero is None else first.zero.repeat_interleave(scheme.group or 24, dim=1)
    fine = torch.ones_like(again, dtype=torch.bool)
    if dtype == torch.bfloat16:
        fine = (first.codes.int() - zero).abs() <= 128
    assert torch.equal(again[fine], first.codes[fine])
    assert ((again.int() - first.codes).abs() <= 1).all()


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    exponents=st.lists(st.integers(-8, 8), min_size=6, max_size=6),
    seed=st.integers(0, 10_000),
)
def test_scaling_a_row_by_a_power_of_two_scales_what_is_left_of_it(bits, exponents, seed):
    weight, scheme = draw(seed)[:-1], WeightScheme(bits=bits)
    by = torch.tensor([2.0**e for e in exponents[:5]])[:, None]
    assert torch.equal(
        quantize_weight(weight * by, scheme).dequantized(), quantize_weight(weight, scheme).dequantized() * by
    )


@settings(max_examples=40, deadline=None)
@given(scheme=schemes, seed=st.integers(0, 10_000))
def test_no_value_is_wrong_by_more_than_half_a_step_unless_it_is_clamped(scheme, seed):
    weight = draw(seed, dtype=torch.float64)
    rounded = quantize_weight(weight, scheme)
    step = rounded.scale.repeat_interleave(weight.shape[1] // rounded.scale.shape[1], dim=1)
    # Clamped by at most half a step in half-range, and by the rounding of the zero point.
    bound = 0.5 if scheme.symmetric and scheme.convention == "largest-level" else 1.0
    wrong = (rounded.dequantized() - weight).abs()
    assert (wrong <= bound * step * (1 + 1e-9)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_chooses_the_share_with_the_least_error(symmetric):
    weight = draw(3, dtype=torch.float64)
    scheme = WeightScheme(bits=3, symmetric=symmetric, clip="mse", group=12)
    chosen = quantize_weight(weight, scheme)
    error = (chosen.dequantized() - weight).abs().pow(2.4).reshape(6, 2, 12).sum(-1)
    plain = WeightScheme(bits=3, symmetric=symmetric, group=12)
    least = torch.full_like(error, torch.inf)
    for step in range(80):
        scale, zero = weight_scales(weight, plain)
        tried = Quantized(
            quantize_with(weight, scale * (1 - step / 100), zero, plain),
            scale * (1 - step / 100),
            zero,
            plain,
        )
        least = least.minimum((tried.dequantized() - weight).abs().pow(2.4).reshape(6, 2, 12).sum(-1))
    torch.testing.assert_close(error, least, rtol=1e-5, atol=1e-12)
    unclipped = (quantize_weight(weight, plain).dequantized() - weight).abs().pow(2.4).reshape(6, 2, 12)
    assert (error <= unclipped.sum(-1) * (1 + 1e-6)).all()
    assert (error < 0.99 * unclipped.sum(-1)).any()


@settings(max_examples=30, deadline=None)
@given(scheme=schemes, seed=st.integers(0, 10_000), clip=st.sampled_from(["none", "mse"]))
def test_fake_rounding_gives_the_values_of_rounding(scheme, seed, clip):
    scheme = scheme.model_copy(update={"clip": clip})
    weight = draw(seed)
    assert torch.equal(fake_quantize_weight(weight, scheme), quantize_weight(weight, scheme).dequantized())


def test_full_precision_is_left_alone():
    weight = draw(0)
    assert fake_quantize_weight(weight, WeightScheme(bits=16)) is weight
    assert fake_quantize_tokens(weight, ActivationScheme(bits=16)) is weight
    with pytest.raises(ValueError, match="rounds nothing"):
        quantize_weight(weight, WeightScheme(bits=16))


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_pass_the_rounding_and_reach_scales_and_clip_factors(symmetric):
    scheme = WeightScheme(bits=4, symmetric=symmetric)
    weight = draw(1, rows=4, dtype=torch.float64)[:3].requires_grad_()
    high = torch.full((3, 1), 0.7, dtype=torch.float64, requires_grad=True)
    low = torch.full((3, 1), 0.6, dtype=torch.float64, requires_grad=True)
    weigh = torch.randn(3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (fake_quantize_weight(weight, scheme, high, low) * weigh).sum().backward()

    # By hand: with the roundings held as constants r (codes = x/s + z + r), s and z as functions of the ends.
    w, h, k = (t.detach().clone().requires_grad_() for t in (weight, high, low))
    hi, lo = w.amax(1, keepdim=True).clamp(min=0) * h, w.amin(1, keepdim=True).clamp(max=0) * k
    if symmetric:
        s, z = torch.maximum(hi, -lo) / 7, torch.zeros(3, 1, dtype=torch.float64)
    else:
        s = (hi - lo) / 15
        raw = -8 - lo / s
        z = raw + (raw.round() - raw).detach()
    raw = w / s + z
    inside = (raw >= -8) & (raw <= 7)
    clamped = torch.where(inside, raw, raw.detach().clamp(-8, 7))
    q = clamped + (clamped.round() - clamped).detach()
    (((q - z) * s) * weigh).sum().backward()
    for ours, theirs in ((weight, w), (high, h), (low, k)):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert (high.grad != 0).any()
    assert (low.grad != 0).any()


def test_tokens_have_their_own_scale_each_and_learn_their_clipping():
    x = torch.tensor([[1.0, -2.0, 0.3], [100.0, -50.0, 7.0]], dtype=torch.float64)
    out = fake_quantize_tokens(x, ActivationScheme(bits=8, symmetric=True))
    torch.testing.assert_close(out, (x / (x.abs().amax(1, True) / 127)).round() * x.abs().amax(1, True) / 127)
    whole = fake_quantize_tokens(x, ActivationScheme(bits=8, symmetric=True, ratio=0.5))
    s = 0.5 * x.abs().amax(1, True) / 127
    torch.testing.assert_close(whole, (x / s).round().clamp(-128, 127) * s)

    share = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    clipped = fake_quantize_tokens(x, ActivationScheme(bits=8, symmetric=True), share, share)
    assert torch.equal(clipped.detach(), whole)
    clipped[1, 0].backward()
    # The clamped value is 127 s = 0.5 share... of the largest, 100.
    torch.testing.assert_close(share.grad, torch.tensor(100.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_token_of_zeros_stays_zero(symmetric, dtype):
    out = fake_quantize_tokens(torch.zeros(2, 5, dtype=dtype), ActivationScheme(bits=4, symmetric=symmetric))
    assert torch.equal(out, torch.zeros(2, 5, dtype=dtype))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_of_zeros_stays_zero(symmetric):
    rounded = quantize_weight(torch.zeros(2, 5), WeightScheme(bits=4, symmetric=symmetric))
    assert torch.equal(rounded.dequantized(), torch.zeros(2, 5))


def test_rounding_goes_half_to_even_and_passes_gradients():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5], requires_grad=True)
    out = round_ste(x)
    assert torch.equal(out.detach(), torch.tensor([0.0, 2.0, 2.0, -0.0]))
    (out * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert torch.equal(x.grad, torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_bad_weights_are_refused_by_name():
    weight = draw(0)
    weight[1, 2] = torch.nan
    weight[1, 3] = torch.inf
    with pytest.raises(UserError, match=r"'model.layers.0.x' holds 2 values"):
        quantize_weight(weight, WeightScheme(bits=4), "model.layers.0.x")
    with pytest.raises(
        UserError, match=r"group size 7 does not divide the 24 inputs of 'x'; near it do 3, 4, 6, 8"
    ):
        quantize_weight(draw(0), WeightScheme(bits=4, group=7), "x")
