"""Rounding with error feedback: against the definition, one column and one inverse at a time."""

import pytest
import torch
from graftwork import UserError
from graftwork.transform.feedback import output_error, round_with_feedback
from graftwork.transform.quantizer import quantize_weight, weight_scales
from graftwork.transform.scheme import WeightScheme
from hypothesis import given, settings
from hypothesis import strategies as st


def draw(seed, rows=12, columns=32, tokens=200, dtype=torch.float64):
    """A weight and the second moments of correlated inputs of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    size = torch.logspace(-1, 1, columns, dtype=torch.float64)[torch.randperm(columns, generator=generator)]
    x = (torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mix) * size
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)
    return weight, x.T @ x


def by_definition(weight, moments, scheme, damp, order):
    """Round a column, then give the free ones the least-squares answer to its error, with a fresh inverse each."""
    columns = weight.shape[1]
    scale, zero = weight_scales(weight, scheme)
    size = scheme.group or columns
    hessian = moments + damp * moments.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    w, codes = weight.clone(), torch.zeros_like(weight)
    free = list(order)
    least, largest = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    while free:
        j, rest = free[0], free[1:]
        s = scale[:, j // size]
        z = torch.zeros_like(s) if zero is None else zero[:, j // size].double()
        codes[:, j] = (w[:, j] / s + z).clamp(least, largest).round()
        wrong = w[:, j] - (codes[:, j] - z) * s
        if rest:
            # min over d of (wrong, d) H (wrong, d)^T: d = wrong H_jR H_RR^-1, and the weights move by it.
            answer = torch.linalg.solve(hessian[rest][:, rest], hessian[rest, j])
            w[:, rest] += wrong[:, None] * answer
        free = rest
    return codes


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([None, 8]),
    symmetric=st.booleans(),
    order=st.sampled_from(["given", "importance"]),
    block=st.sampled_from([1, 5, 32, 128]),
)
def test_codes_are_those_of_the_definition(seed, bits, group, symmetric, order, block):
    weight, moments = draw(seed)
    scheme = WeightScheme(bits=bits, group=group, symmetric=symmetric)
    taken = range(32) if order == "given" else moments.diagonal().argsort(descending=True).tolist()
    expected = by_definition(weight, moments, scheme, 0.01, taken)
    rounded = round_with_feedback(weight, moments, scheme, order=order, block=block)
    assert torch.equal(rounded.codes.double(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("order", ["given", "importance"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_inputs_that_have_nothing_in_common_give_rounding_to_nearest(dtype, order, symmetric, clip):
    weight, _ = draw(0, dtype=dtype)
    scheme = WeightScheme(bits=3, group=8, symmetric=symmetric, clip=clip)
    nearest = quantize_weight(weight, scheme)
    for moments in (torch.eye(32), torch.diag(torch.arange(1.0, 33))):
        rounded = round_with_feedback(weight, moments, scheme, order=order)
        assert torch.equal(rounded.codes, nearest.codes)
        assert torch.equal(rounded.dequantized(), nearest.dequantized())


@pytest.mark.parametrize("order", ["given", "importance"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_are_nearer_than_with_rounding_to_nearest(bits, order):
    scheme = WeightScheme(bits=bits)
    wins = 0
    for seed in range(60):
        weight, moments = draw(seed, dtype=torch.float32)
        fed = round_with_feedback(weight, moments, scheme, order=order).dequantized()
        near = quantize_weight(weight, scheme).dequantized()
        wins += output_error(weight - fed, moments) <= output_error(weight - near, moments)
    assert wins >= 57


def test_the_error_is_that_of_the_outputs():
    generator = torch.Generator().manual_seed(1)
    x, difference = torch.randn(50, 6, generator=generator), torch.randn(4, 6, generator=generator)
    expected = (x.double() @ difference.double().T).square().sum().item()
    assert output_error(difference, x.double().T @ x.double()) == pytest.approx(expected, rel=1e-12)


def test_blocks_of_columns_change_nothing_but_the_order_of_sums():
    weight, moments = draw(5, rows=16, columns=160, tokens=400, dtype=torch.float32)
    whole = round_with_feedback(weight, moments, WeightScheme(bits=4), block=160)
    blocks = round_with_feedback(weight, moments, WeightScheme(bits=4), block=16)
    assert (whole.codes == blocks.codes).float().mean() > 0.995
    near = output_error(weight - whole.dequantized(), moments)
    assert output_error(weight - blocks.dequantized(), moments) == pytest.approx(near, rel=0.05)


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_that_were_always_zero_get_zero_weights_and_leave_the_rest_alone(symmetric):
    weight, moments = draw(2, columns=16)
    padded = torch.zeros(12, 20, dtype=torch.float64)
    padded[:, 2:18] = weight
    padded[:, 18] = 1000
    wide = torch.zeros(20, 20, dtype=torch.float64)
    wide[2:18, 2:18] = moments
    scheme = WeightScheme(bits=4, symmetric=symmetric)
    rounded = round_with_feedback(padded, wide, scheme).dequantized()
    assert torch.equal(rounded[:, 2:18], round_with_feedback(weight, moments, scheme).dequantized())
    assert (rounded[:, [0, 1, 18, 19]] == 0).all()


def test_the_size_of_the_moments_does_not_matter():
    weight, moments = draw(4)
    scheme = WeightScheme(bits=3)
    once, scaled = (round_with_feedback(weight, h, scheme).codes for h in (moments, moments / 1024))
    assert torch.equal(once, scaled)


def test_the_weight_given_is_left_as_it_is():
    weight, moments = draw(6)
    before, moments_before = weight.clone(), moments.clone()
    round_with_feedback(weight, moments, WeightScheme(bits=3), order="importance")
    assert torch.equal(weight, before)
    assert torch.equal(moments, moments_before)


def test_moments_without_a_factor_are_an_error_or_rounding_to_nearest():
    weight, _ = draw(0)
    x = torch.ones(1, 32, dtype=torch.float64)
    flat = x.T @ x - 1e-6 * torch.eye(32, dtype=torch.float64)
    with pytest.raises(
        UserError, match=r"of 'a.b' are not positive definite with damp=0 \(smallest eigenvalue -1e-06"
    ):
        round_with_feedback(weight, flat, WeightScheme(bits=4), damp=0, name="a.b")
    with pytest.warns(UserWarning, match="it was rounded to nearest"):
        rounded = round_with_feedback(weight, flat, WeightScheme(bits=4), damp=0, singular="nearest")
    assert torch.equal(rounded.codes, quantize_weight(weight, WeightScheme(bits=4)).codes)
    # Some damping mends it.
    round_with_feedback(weight, flat, WeightScheme(bits=4), damp=0.01)
    with pytest.raises(UserError, match="were zero for every calibration token"):
        round_with_feedback(weight, torch.zeros(32, 32), WeightScheme(bits=4))


def test_bad_numbers_are_refused_by_name():
    weight, moments = draw(0)
    broken = moments.clone()
    broken[3, 4] = torch.nan
    with pytest.raises(UserError, match=r"second moments of the inputs of 'a.b' hold NaN"):
        round_with_feedback(weight, broken, WeightScheme(bits=4), name="a.b")
    weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"weight 'a.b' holds 1 values"):
        round_with_feedback(weight, moments, WeightScheme(bits=4), name="a.b")
