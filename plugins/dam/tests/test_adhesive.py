"""The diagonal between two factors: where it cancels, where it acts, closed forms, starts, learning."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.transform.quantizer import fake_quantize_tokens, fake_quantize_weight, quantize_weight
from graftwork.transform.scheme import ActivationScheme, WeightScheme
from graftwork_dam import (
    Factors,
    Layer,
    Problem,
    Rounder,
    Rounding,
    adhered_output,
    candidates,
    choose,
    factorise,
    latent_error,
    learn,
    normalised,
    power_split,
    relative_loss,
    smooth_split,
)
from graftwork_dam.adhesive import LIMIT, parse_init
from graftwork_kernels import scaled_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**31)
BITS = st.sampled_from([2, 3, 4, 8])
PLAIN = Rounding(WeightScheme(bits=16), ActivationScheme(bits=16), ActivationScheme(bits=16))


def rounding(weights: int = 16, inputs: int = 16, latents: int = 16, *, symmetric: bool = False) -> Rounding:
    return Rounding(
        WeightScheme(bits=weights),
        ActivationScheme(bits=inputs, symmetric=symmetric),
        ActivationScheme(bits=latents, symmetric=symmetric),
    )


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def decaying(rows: int = 12, columns: int = 16, rank: int = 6, seed: int = 0) -> Factors:
    """Factors of a weight whose singular values fall by orders of magnitude, as those of language models do."""
    left, _ = torch.linalg.qr(draw(rows, rank, seed=seed))
    right, _ = torch.linalg.qr(draw(columns, rank, seed=seed + 1))
    values = torch.logspace(1, -1, rank, dtype=torch.float64)
    return Factors(left, values, values[:, None] * right.T)


def layer_of(weight: torch.Tensor, x: torch.Tensor) -> Layer:
    return Layer("layer", weight, (x.T @ x).double(), len(x), x)


# ---------------------------------------------------------------- where it cancels


@given(SEEDS, st.floats(-3, 3))
@settings(max_examples=30, deadline=None)
def test_without_rounding_the_diagonal_cancels(seed: int, tilt: float) -> None:
    factors = decaying(seed=seed)
    spread = torch.linspace(-1, 1, factors.rank, dtype=torch.float64) * tilt * math.log(10)
    x = draw(5, 16, seed=seed + 2)
    torch.testing.assert_close(
        adhered_output(x, factors, spread, PLAIN), x @ factors.product().T, rtol=1e-10, atol=1e-10
    )


def test_without_rounding_an_input_diagonal_cancels() -> None:
    factors, x = decaying(), draw(5, 16, seed=3)
    log_e = draw(16, seed=4)
    found = adhered_output(x, factors, torch.zeros(6, dtype=torch.float64), PLAIN, log_e)
    torch.testing.assert_close(found, x @ factors.product().T, rtol=1e-10, atol=1e-10)


@given(SEEDS, BITS, BITS, st.integers(-6, 6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_factor_of_all_of_it_changes_nothing(
    seed: int, weights: int, latents: int, power: int, symmetric: bool
) -> None:
    factors = decaying(seed=seed).to(torch.float32)
    x = draw(5, 16, seed=seed + 2, dtype=torch.float32)
    log_d = draw(6, seed=seed + 3, dtype=torch.float32)
    left, right = factors.split(log_d)
    scheme = WeightScheme(bits=weights)
    tokens = ActivationScheme(bits=latents, symmetric=symmetric)
    outputs = []
    # A power of two, so that scaling itself is exact.
    for factor in (1.0, 2.0**power):
        one, other = quantize_weight(left * factor, scheme), quantize_weight(right / factor, scheme)
        outputs.append((one, other))
        latent = fake_quantize_tokens(x @ other.dequantized().T, tokens)
        outputs[-1] = (one, other, latent @ one.dequantized().T)
    (a, b, y), (c, d, z) = outputs
    assert torch.equal(a.codes, c.codes)
    assert torch.equal(b.codes, d.codes)
    assert torch.equal(a.scale * 2.0**power, c.scale)
    assert torch.equal(b.scale, d.scale * 2.0**power)
    assert torch.equal(y, z)


@given(SEEDS, BITS)
@settings(max_examples=40, deadline=None)
def test_rounded_rows_of_the_right_factor_do_not_feel_it(seed: int, bits: int) -> None:
    right = decaying(seed=seed).scaled
    d = torch.exp2(torch.randint(-5, 6, (6,), generator=torch.Generator().manual_seed(seed))).double()
    scheme = WeightScheme(bits=bits)
    scaled = fake_quantize_weight(right / d[:, None], scheme) * d[:, None]
    assert torch.equal(scaled, fake_quantize_weight(right, scheme))


def test_columns_of_the_left_factor_do() -> None:
    factors = decaying()
    scheme = WeightScheme(bits=4)

    def error(log_d: torch.Tensor) -> float:
        left, _ = factors.split(log_d)
        return float((fake_quantize_weight(left, scheme) - left).norm() / left.norm())

    # With d = S the first column takes the range and the others are lost.
    crushed = fake_quantize_weight(factors.split(power_split(factors.values, 1.0))[0], scheme)
    assert (crushed[:, -1] == 0).all()
    assert not (fake_quantize_weight(factors.left, scheme)[:, -1] == 0).all()
    assert error(torch.zeros(6, dtype=torch.float64)) < 0.2


# ---------------------------------------------------------------- splits and closed forms


def test_powers_are_the_textbook_splits() -> None:
    factors = decaying()
    v = factors.scaled / factors.values[:, None]
    for power, left, right in (
        (0.0, factors.left, factors.scaled),
        (0.5, factors.left * factors.values.sqrt(), factors.values.sqrt()[:, None] * v),
        (1.0, factors.left * factors.values, v),
    ):
        a, b = factors.split(power_split(factors.values, power))
        torch.testing.assert_close(a, left)
        torch.testing.assert_close(b, right)


def test_smoothquant_in_rank_space_is_its_formula() -> None:
    s, a = torch.tensor([8.0, 2.0, 0.5]), torch.tensor([0.5, 0.25, 0.125])
    for alpha in (0.0, 0.3, 1.0):
        torch.testing.assert_close(smooth_split(s, a, alpha).exp(), s**alpha / a ** (1 - alpha))


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_where_only_latents_are_rounded_d_as_large_as_they_is_best(seed: int) -> None:
    factors = decaying(rank=6, seed=seed)
    h = draw(200, 6, seed=seed + 5) * factors.values
    s = h.abs().amax(0)
    least = latent_error(s.log(), s, factors.left)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(1000):
        other = s.log() + 2 * torch.randn(6, generator=generator, dtype=torch.float64)
        assert latent_error(other, s, factors.left) >= least * (1 - 1e-12)
    # The formula at d = 1: the largest channel sets the step of all.
    torch.testing.assert_close(
        latent_error(torch.zeros(6, dtype=torch.float64), s, factors.left),
        s.max().square() * factors.left.square().sum(),
    )


def test_that_formula_ranks_real_rounding_of_latents_as_long_as_all_are_above_a_step() -> None:
    def losses(lowest: float, bits: int) -> tuple[float, float]:
        """At ``d = s`` and at ``d = 1``, for singular values from 1 to ``lowest``."""
        values = torch.logspace(0, lowest, 6, dtype=torch.float64)
        whole = decaying()
        factors = Factors(whole.left, values, whole.scaled / whole.values[:, None] * values[:, None])
        x = draw(500, 16, seed=9)
        s = (x @ factors.scaled.T).abs().amax(0)
        target = x @ factors.product().T

        def loss(log_d: torch.Tensor) -> float:
            return float(relative_loss(adhered_output(x, factors, log_d, rounding(latents=bits)), target))

        return loss(s.log()), loss(torch.zeros(6, dtype=torch.float64))

    best, flat = losses(-1.0, 8)
    assert best < 0.9 * flat
    # Channels below half a step are lost whole, which costs less than the formula says.
    best, flat = losses(-4.0, 4)
    assert best > flat


def test_starts_are_normalised_and_named() -> None:
    values = torch.logspace(3, -3, 8, dtype=torch.float64)
    found = candidates("grid", values, values, torch.full((8,), 0.5, dtype=torch.float64))
    assert list(found) == [f"p{p:g}" for p in (0, 0.25, 0.5, 0.75, 1)] + [
        f"smoothquant{a:g}" for a in (0, 0.25, 0.5, 0.75, 1)
    ]
    for log_d in found.values():
        assert log_d.mean().abs() < 1e-12
    assert list(candidates("p05", values, values, values)) == ["p0.5"]
    torch.testing.assert_close(found["p0.5"], normalised(values.sqrt().log()))


def test_values_of_zero_make_a_finite_diagonal() -> None:
    values = torch.tensor([5.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    for log_d in candidates("grid", values, values, values).values():
        assert torch.isfinite(log_d).all()
        assert log_d.abs().max() <= LIMIT
    zeros = torch.zeros(4, dtype=torch.float64)
    for log_d in candidates("grid", zeros, zeros, zeros).values():
        assert torch.equal(log_d, zeros)


@pytest.mark.parametrize(
    ("text", "kind", "exponent"),
    [
        ("grid", "grid", 0),
        ("p0", "power", 0),
        ("p1", "power", 1),
        ("p05", "power", 0.5),
        ("p025", "power", 0.25),
        ("p0.3", "power", 0.3),
        ("smoothquant", "smoothquant", 0.5),
        ("smoothquant1", "smoothquant", 1),
        ("smoothquant0.25", "smoothquant", 0.25),
    ],
)
def test_starts_are_read(text: str, kind: str, exponent: float) -> None:
    assert parse_init(text) == (kind, exponent)


@pytest.mark.parametrize("text", ["", "p", "q05", "p1.5", "p2", "smooth", "smoothquant7", "Grid"])
def test_other_starts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"none of grid|between 0 and 1"):
        parse_init(text)


# ---------------------------------------------------------------- learning


@given(SEEDS, st.sampled_from([2, 3, 4]), st.sampled_from([16, 4]), st.floats(0.01, 3))
@settings(max_examples=25, deadline=None)
def test_learning_never_ends_above_its_start(seed: int, weights: int, latents: int, lr: float) -> None:
    factors, x = decaying(seed=seed), draw(40, 16, seed=seed + 2)
    target = x @ factors.product().T
    how = rounding(weights, latents=latents)

    def loss(logs):
        return relative_loss(adhered_output(x, factors, logs[0], how), target)

    start = normalised(draw(6, seed=seed + 3))
    found = learn(loss, [start], steps=8, lr=lr)
    assert found.loss <= found.initial
    assert found.initial == pytest.approx(float(loss([start])), rel=1e-12)
    # The loss belongs to the diagonal that is returned: a factor of all of it changes nothing.
    assert float(loss(found.logs)) == pytest.approx(found.loss, rel=1e-6)
    assert found.logs[0].abs().max() <= LIMIT


def test_learning_gets_better_than_the_best_start() -> None:
    factors, x = decaying(rows=24, columns=32, rank=12), draw(200, 32, seed=2)
    weight = factors.product()
    problem = Problem(layer_of(weight, x), factors, rounding(3))
    rounder = Rounder("rtn", WeightScheme(bits=3))
    plain = choose(problem, "grid", rounder, steps=0, lr=0.02)
    learned = choose(problem, "grid", rounder, steps=60, lr=0.02)
    assert learned.name == "learned"
    assert learned.start == plain.loss
    assert learned.loss < 0.99 * plain.loss


def test_the_best_start_has_the_least_loss_of_all() -> None:
    factors, x = decaying(), draw(100, 16, seed=2)
    problem = Problem(layer_of(factors.product(), x), factors, rounding(4, latents=4))
    rounder = Rounder("rtn", WeightScheme(bits=4))
    best = choose(problem, "grid", rounder, steps=0, lr=1).loss
    losses = {name: problem.stored_loss(log_d, rounder) for name, log_d in problem.starts("grid").items()}
    assert best == pytest.approx(min(losses.values()))
    assert max(losses.values()) > 1.2 * best


def test_steps_of_zero_learn_nothing_and_numbers_that_are_none_end_it() -> None:
    start = torch.zeros(3, dtype=torch.float64)
    still = learn(lambda logs: logs[0].square().sum() + 1, [start], steps=0, lr=1.0)
    assert (still.loss, still.finite) == (1.0, True)
    assert torch.equal(still.logs[0], start)
    steps = iter([1.0, 1.0, 0.5, math.nan])
    broken = learn(lambda logs: logs[0].sum() * 0 + next(steps), [start], steps=5, lr=0.1)
    assert (broken.loss, broken.finite) == (0.5, False)
    assert torch.isfinite(broken.logs[0]).all()


def test_the_gradient_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding is replaced by adding fixed noise, so that the function has a derivative to compare with."""
    noise: dict[torch.Size, torch.Tensor] = {}

    def add(x: torch.Tensor) -> torch.Tensor:
        fixed = noise.setdefault(x.shape, draw(*x.shape, seed=len(noise)) * 0.3)
        return x + fixed

    monkeypatch.setattr(scaled_quantize, "round_ste", add)
    factors, x = decaying(), draw(7, 16, seed=2)
    target = x @ factors.product().T
    log_d = (0.3 * draw(6, seed=5)).requires_grad_()
    log_e = (0.1 * draw(16, seed=6)).requires_grad_()
    how = rounding(4, inputs=6, latents=5)

    def loss(d: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return relative_loss(adhered_output(x, factors, d, how, e), target)

    assert torch.autograd.gradcheck(loss, (log_d, log_e), eps=1e-6, atol=1e-6)
    assert float(torch.autograd.grad(loss(log_d, log_e), log_d)[0].abs().max()) > 1e-6


def test_moments_stand_for_all_tokens_where_weights_alone_are_rounded() -> None:
    weight, x = draw(12, 16, seed=1), draw(300, 16, seed=2)
    factors = factorise(weight, 6, moments=x.T @ x)
    layer = layer_of(weight, x)
    short = Problem(layer, factors, rounding(4))
    assert len(short.x) == 16
    log_d = draw(6, seed=4)
    found = short.loss(log_d)
    every = relative_loss(adhered_output(x, factors, log_d, rounding(4)), x @ weight.T)
    torch.testing.assert_close(found, every)
    assert len(Problem(layer, factors, rounding(4, latents=4)).x) == 300


def test_the_example_of_the_readme_runs() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {
        "weight": draw(12, 16, dtype=torch.float32),
        "x": draw(60, 16, seed=1, dtype=torch.float32),
        "rank": 6,
        "weight_scheme": WeightScheme(bits=4),
        "input_scheme": ActivationScheme(bits=16),
        "latent_scheme": ActivationScheme(bits=4),
    }
    exec(code, names)
    assert names["left"].shape == (12, 6)
    assert names["right"].shape == (6, 16)
    assert names["choice"].loss <= names["choice"].start
