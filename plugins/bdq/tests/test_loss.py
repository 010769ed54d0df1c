"""The recursive cross-entropy against its definition, in both signs."""

from __future__ import annotations

import math

import pytest
import torch
from graftwork_bdq import RceLoss, recursive_cross_entropy
from graftwork_bdq.loss import self_weighed
from hypothesis import given, settings
from hypothesis import strategies as st

SIGNS = {"symmetric": -1, "printed": 1}
deltas = st.sampled_from([0.01, 0.3, 0.5, 0.9, 1.0])


def draw(seed: int, rows: int = 5, size: int = 11, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, size, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, size, (rows,), generator=generator)


def by_sum(logits: torch.Tensor, q: torch.Tensor, delta: float, sign: str) -> torch.Tensor:
    """The definition, term by term, with p made by softmax; differentiable."""
    p = logits.softmax(-1)
    s = (p * (delta * p + (1 - delta) * q).log()).sum(-1)
    return -(q * p.log()).sum(-1) + SIGNS[sign] * s


def one_hot(labels: torch.Tensor, size: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, size).double()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), delta=deltas, sign=st.sampled_from(list(SIGNS)), teacher=st.booleans())
def test_value_and_gradient_are_those_of_the_sum(seed: int, delta: float, sign: str, teacher: bool) -> None:
    logits, labels = draw(seed)
    other = draw(seed + 1)[0] if teacher else None
    q = one_hot(labels, 11) if other is None else other.softmax(-1)
    weights = draw(seed + 2, size=5)[0][:, 0]
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    # One row at a time, so that the pieces are joined rightly, too.
    found = recursive_cross_entropy(ours, labels, delta=delta, sign=sign, teacher=other, chunk_bytes=1)
    expected = by_sum(plain, q, delta, sign)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad, atol=1e-9, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), delta=st.floats(0.001, 1))
def test_the_closed_form(seed: int, delta: float) -> None:
    logits, labels = draw(seed)
    p = logits.softmax(-1)
    at_label = p.gather(1, labels[:, None]).squeeze(1)
    entropy = -(p * p.log()).sum(-1)
    closed = (
        -entropy
        + (1 - at_label) * math.log(delta)
        + at_label * ((delta * at_label + 1 - delta).log() - at_label.log())
    )
    torch.testing.assert_close(self_weighed(logits, labels, delta=delta), closed, atol=1e-6, rtol=0)
    direct = (p * (delta * p + (1 - delta) * one_hot(labels, 11)).log()).sum(-1)
    torch.testing.assert_close(closed, direct, atol=1e-6, rtol=0)


def test_with_delta_1_the_term_is_the_negative_entropy() -> None:
    logits, labels = draw(0)
    p = logits.softmax(-1)
    torch.testing.assert_close(self_weighed(logits, labels, delta=1.0), (p * p.log()).sum(-1))


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("delta", [0.1, 0.5, 1.0])
def test_a_perfect_prediction_costs_nothing(sign: str, delta: float) -> None:
    logits = torch.full((1, 7), -1e3, dtype=torch.float64)
    logits[0, 3] = 1e3
    loss = recursive_cross_entropy(logits, torch.tensor([3]), delta=delta, sign=sign)
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_the_printed_sign_rewards_spreading_and_the_other_does_not() -> None:
    """At delta = 0.5 over 49,152 tokens: -0.69 and 22.3 for the uniform one, -5.5 and 6.9 for half on the label."""
    size, labels = 49_152, torch.tensor([0])
    uniform = torch.zeros(1, size, dtype=torch.float64)
    half = torch.zeros(1, size, dtype=torch.float64)
    half[0, 0] = math.log(size - 1)
    cost = {
        (name, sign): recursive_cross_entropy(logits, labels, sign=sign).item()
        for name, logits in (("uniform", uniform), ("half", half))
        for sign in SIGNS
    }
    assert cost["uniform", "printed"] == pytest.approx(-0.69, abs=0.01)
    assert cost["half", "printed"] == pytest.approx(-5.5, abs=0.05)
    assert cost["uniform", "symmetric"] == pytest.approx(22.3, abs=0.05)
    assert cost["half", "symmetric"] == pytest.approx(6.9, abs=0.05)


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("delta", [0.5, 1.0])
def test_large_logits_stay_numbers(sign: str, teacher: bool, delta: float) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4]], requires_grad=True)
    other = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0], [0.0, 0.0, 1e4]]) if teacher else None
    loss = recursive_cross_entropy(logits, torch.tensor([1, 0, 2]), delta=delta, sign=sign, teacher=other)
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all())
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


def test_the_mean_leaves_out_what_has_no_label() -> None:
    logits, labels = draw(4, rows=6)
    labels[[1, 4]] = -100
    logits = logits.requires_grad_()
    loss = RceLoss(0.3)(logits.view(2, 3, 11), labels.view(2, 3))
    kept = [0, 2, 3, 5]
    expected = by_sum(logits, one_hot(labels.clamp_min(0), 11), 0.3, "symmetric")[kept].mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad is not None
    assert bool((logits.grad[[1, 4]] == 0).all())
    assert RceLoss()(logits, torch.full((6,), -100)).item() == 0


def test_in_bfloat16_sums_are_in_float32() -> None:
    logits, labels = draw(5, rows=3, size=500)
    rounded = logits.bfloat16()
    found = recursive_cross_entropy(rounded, labels)
    assert found.dtype == torch.float32
    exact = by_sum(rounded.double(), one_hot(labels, 500), 0.5, "symmetric")
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("delta", [0.0, -0.1, 1.01, math.nan])
def test_a_delta_that_is_no_share_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta is a share greater than 0 and at most 1"):
        RceLoss(delta)
    with pytest.raises(ValueError, match="delta"):
        recursive_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), delta=delta)


def test_an_unknown_sign_is_refused() -> None:
    with pytest.raises(ValueError, match="'symmetric'"):
        RceLoss(sign="minus")  # type: ignore[arg-type]
