"""Where the scales start, against what they are claimed to minimise, and their forms."""

from __future__ import annotations

import pytest
import torch
from graftwork import UserError
from graftwork.transform.quantizer import fake_quantize_tokens, quantize_weight
from graftwork.transform.scheme import ActivationScheme, WeightScheme
from graftwork.transform.structure import Place
from graftwork_bdq.diagonal import (
    Diagonal,
    energy_sigma,
    factors,
    fold_into,
    kron_projected,
    pooled,
    scales,
    smooth_sigma,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

PLAIN = Place("down", ("mlp.down_proj",), "mlp.up_proj", "linear")


def draw(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def cost(x: torch.Tensor, w: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    s = sigma.exp()
    return (x * s).square().sum() * (w / s).square().sum()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999))
def test_energy_reaches_the_bound_of_cauchy_and_schwarz(seed: int) -> None:
    x, w = draw(seed, 40, 12) * draw(seed + 1, 12).exp(), draw(seed + 2, 7, 12) * draw(seed + 3, 12).exp()
    sigma = energy_sigma(x.square().sum(0), w.square().sum(0))
    assert sigma.mean().item() == pytest.approx(0, abs=1e-12)
    least = (x.norm(dim=0) * w.norm(dim=0)).sum().square()
    torch.testing.assert_close(cost(x, w, sigma), least)
    for trial in range(1000):
        other = sigma + 0.3 * draw(seed * 1000 + trial, 12)
        assert cost(x, w, other) >= least * (1 - 1e-12)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999))
def test_energy_is_least_under_shared_scales_too(seed: int) -> None:
    """6 query heads of 2 share 3 value heads: one scale per value channel, from the energies summed."""
    place = Place("o", ("self_attn.o_proj",), "self_attn.v_proj", "linear", 2, 2)
    x, w = draw(seed, 40, 12) * draw(seed + 1, 12).exp(), draw(seed + 2, 7, 12)
    sigma = energy_sigma(pooled(x.square().sum(0), place), pooled(w.square().sum(0), place))
    assert sigma.shape == (6,)
    least = cost(x, w, place.spread(sigma))
    for trial in range(300):
        other = sigma + 0.3 * draw(seed * 1000 + trial, 6)
        assert cost(x, w, place.spread(other)) >= least * (1 - 1e-12)


def test_a_channel_that_is_never_used_gets_a_bounded_scale() -> None:
    x, w = torch.tensor([1.0, 0.0, 4.0]), torch.tensor([1.0, 1.0, 0.0])
    sigma = energy_sigma(x, w)
    assert bool(torch.isfinite(sigma).all())
    assert sigma.abs().max() < 8
    assert bool((energy_sigma(torch.zeros(3), torch.zeros(3)) == 0).all())


def test_smoothquant_is_its_formula() -> None:
    x, w = draw(1, 9).abs(), draw(2, 9).abs()
    divisor = x**0.3 / w**0.7
    torch.testing.assert_close(smooth_sigma(x, w, 0.3).exp(), 1 / divisor)


@pytest.mark.parametrize(("size", "expected"), [(576, (24, 24)), (1536, (32, 48)), (13, (1, 13))])
def test_factors_are_as_square_as_can_be(size: int, expected: tuple[int, int]) -> None:
    assert factors(size) == expected


@pytest.mark.parametrize("size", [576, 1536])
def test_kron_is_a_kronecker_product(size: int) -> None:
    sigma = draw(3, size)
    diagonal = Diagonal(sigma, "kron")
    first, second = diagonal.first.detach(), diagonal.second.detach()
    assert (len(first), len(second)) == factors(size)
    torch.testing.assert_close(scales(diagonal()), torch.kron(first.exp(), second.exp()))


def test_kron_starts_at_the_nearest_of_its_form() -> None:
    sigma = draw(4, 48)
    first, second = kron_projected(sigma)

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ((a[:, None] + b).flatten() - sigma).square().sum()

    best = distance(first, second)
    for trial in range(200):
        assert distance(first + 0.1 * draw(trial, 6), second + 0.1 * draw(trial + 500, 8)) >= best
    # What has the form already is not changed.
    torch.testing.assert_close(
        Diagonal((first[:, None] + second).flatten(), "kron")(), (first[:, None] + second).flatten().float()
    )


def test_a_scale_per_row_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="cannot change anything where every row"):
        Diagonal(torch.zeros(4), "row")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), bits=st.sampled_from([2, 4, 8]), symmetric=st.booleans())
def test_scales_of_rows_and_tokens_change_nothing(seed: int, bits: int, symmetric: bool) -> None:
    """Exactly for powers of two, and up to ties of rounding for any: BDQ's outer diagonal is a no-op here."""
    weight = draw(seed, 8, 16).float()
    powers = 2.0 ** torch.randint(-5, 6, (8, 1), generator=torch.Generator().manual_seed(seed))
    scheme = WeightScheme(bits=bits, symmetric=symmetric)
    plain = quantize_weight(weight, scheme).dequantized()
    assert torch.equal(quantize_weight(weight * powers, scheme).dequantized() / powers, plain)
    tokens = ActivationScheme(bits=bits, symmetric=symmetric)
    assert torch.equal(
        fake_quantize_tokens(weight * powers, tokens) / powers, fake_quantize_tokens(weight, tokens)
    )
    any_scale = draw(seed + 1, 8, 1).float().exp()
    other = quantize_weight(weight * any_scale, scheme).dequantized() / any_scale
    assert torch.isclose(other, plain, rtol=1e-5, atol=1e-6).float().mean() > 0.98


class Shifted(nn.Module):
    """A norm that multiplies with 1 + weight, as Gemma's do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.2, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + self.weight)


@pytest.mark.parametrize("norm", [Shifted(), nn.LayerNorm(3), nn.RMSNorm(3)])
def test_norms_are_scaled_whatever_they_do_with_their_weight(norm: nn.Module) -> None:
    x, scale = torch.randn(5, 3), torch.tensor([2.0, 0.5, 3.0])
    before = norm(x).detach()
    fold_into(norm, scale, "norm")
    torch.testing.assert_close(norm(x).detach(), before * scale)


def test_scales_stay_within_bounds() -> None:
    assert scales(torch.tensor([-100.0, 100.0])).log().tolist() == pytest.approx([-8, 8])
