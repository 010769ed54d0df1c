"""COIECD's sets and scores against the literal formulas, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork_coiecd import CONFORMING, LOWER, UPPER, Coiecd, band, bounds, entropy
from hypothesis import assume, given, settings
from hypothesis import strategies as st

EDGE = 1e-9
ALPHAS = st.sampled_from([0.0, 0.3, 0.5, 1.0, 2.0])
RATIOS = st.sampled_from([1.0, 1.5, 2.0, 4.0, 16.0, math.inf])


@st.composite
def streams(draw: Any, ruled_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Two streams of logits, B x V; a few large logits, so that all sets occur."""
    rows, words = draw(st.integers(1, 4)), draw(st.integers(2, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0, 30.0]))
    both = scale * torch.randn(2, rows, words, generator=generator, dtype=torch.float64)
    if ruled_out:
        gone = torch.rand(both.shape, generator=generator) < draw(st.sampled_from([0.1, 0.5]))
        gone[..., 0] = False
        both[gone] = -torch.inf
    return both[0], both[1]


def literal(z2: torch.Tensor, z1: torch.Tensor, ratio: float, entropy_of: Any = None) -> Any:
    """The official code's masks, row by row: a softmax over information minus entropy, and its bounds."""
    lower, upper, distance = [], [], math.inf
    for l2, l1 in zip(z2.log_softmax(-1), z1.log_softmax(-1), strict=True):
        h1 = -(l1.exp() * l1).sum() if entropy_of is None else entropy_of
        normalised = (-l2 - h1).log_softmax(-1)
        low = normalised.min() + math.log(ratio) - normalised
        high = normalised - (normalised.max() - math.log(ratio))
        distance = min(distance, float(low.abs().min()), float(high.abs().min()))
        row = low > 0
        lower.append(row & ~(row.sum() == 1))
        upper.append(high > 0)
    return torch.stack(lower), torch.stack(upper), distance


@given(streams(), st.sampled_from([1.5, 2.0, 4.0, 16.0]))
def test_masks_are_those_of_the_entropy_form(both: Any, ratio: float) -> None:
    lower, upper, distance = literal(*both, ratio)
    assume(distance > EDGE)
    ours = bounds(both[0], ratio)
    assert torch.equal(ours[0], lower)
    assert torch.equal(ours[1], upper)


@given(streams(), st.sampled_from([2.0, 4.0]), st.floats(-20, 20))
def test_the_entropy_cancels(both: Any, ratio: float, constant: float) -> None:
    plain = literal(*both, ratio)
    other = literal(*both, ratio, entropy_of=constant)
    assume(min(plain[2], other[2]) > EDGE)
    assert torch.equal(plain[0], other[0])
    assert torch.equal(plain[1], other[1])


@given(streams(), st.sampled_from([1.5, 2.0, 4.0, 16.0]))
def test_masks_in_probabilities(both: Any, ratio: float) -> None:
    p2 = both[0].softmax(-1)
    highest, lowest = p2.amax(-1, keepdim=True), p2.amin(-1, keepdim=True)
    assume(float((p2 / (highest / ratio) - 1).abs().min()) > EDGE)
    assume(float((p2 / (ratio * lowest) - 1).abs().min()) > EDGE)
    lower, upper = bounds(both[0], ratio)
    second = p2.topk(2).values[:, 1:]
    assert torch.equal(lower, (p2 > highest / ratio) & (second > highest / ratio))
    assert torch.equal(upper, p2 < ratio * lowest)


@given(streams(), ALPHAS, RATIOS, st.booleans())
def test_scores_are_those_of_the_formula(both: Any, alpha: float, ratio: float, swapped: bool) -> None:
    l2, l1 = both[0].log_softmax(-1), both[1].log_softmax(-1)
    lower, upper = bounds(both[0], ratio)
    violating = (lower | upper) != swapped
    merged = torch.where(violating, l2, l1) + alpha * (l2 - l1)
    scores = Coiecd(alpha, ratio, swapped=swapped).scores(*both)
    torch.testing.assert_close(scores.log_softmax(-1), merged.log_softmax(-1))


@given(streams(ruled_out=True))
def test_ordinary_decoding_bit_for_bit(both: Any) -> None:
    assert torch.equal(Coiecd(1.0, 1.0).scores(*both), both[0])
    single = tuple(one.float() for one in both)
    assert torch.equal(Coiecd(1.0, 1.0).scores(*single), single[0])
    assert torch.equal(Coiecd(1.0, constraint="band", gamma=math.inf).scores(*single), single[0])


@given(streams(), ALPHAS)
def test_an_infinite_ratio_is_cad(both: Any, alpha: float) -> None:
    cad = (1 + alpha) * both[0].log_softmax(-1) - alpha * both[1].log_softmax(-1)
    for method in (Coiecd(alpha, math.inf), Coiecd(alpha, constraint="band", gamma=0.0)):
        torch.testing.assert_close(method.scores(*both).log_softmax(-1), cad.log_softmax(-1))


@given(streams(ruled_out=True), ALPHAS, RATIOS)
def test_the_same_prompt_twice_changes_nothing(both: Any, alpha: float, ratio: float) -> None:
    assert torch.equal(Coiecd(alpha, ratio).scores(both[0], both[0].clone()), both[0])


@given(streams())
def test_alpha_zero_without_violations_is_the_prior(both: Any) -> None:
    scores = Coiecd(0.0, 1.0).scores(*both)
    torch.testing.assert_close(scores.log_softmax(-1), both[1].log_softmax(-1))


@given(streams(), ALPHAS, st.sampled_from([2.0, 4.0]), st.floats(-50, 50), st.floats(-50, 50))
def test_shifts_and_permutations(both: Any, alpha: float, ratio: float, a: float, b: float) -> None:
    assume(literal(*both, ratio)[2] > EDGE)
    method = Coiecd(alpha, ratio)
    scores = method.scores(*both).log_softmax(-1)
    shifted = method.scores(both[0] + b, both[1] + a).log_softmax(-1)
    torch.testing.assert_close(shifted, scores)
    order = torch.randperm(both[0].shape[1], generator=torch.Generator().manual_seed(0))
    permuted = method.scores(both[0][:, order], both[1][:, order]).log_softmax(-1)
    torch.testing.assert_close(permuted, scores[:, order])


@given(streams(ruled_out=True), ALPHAS, RATIOS, st.sampled_from(["softmax", "band"]))
def test_rows_do_not_know_of_each_other(both: Any, alpha: float, ratio: float, constraint: Any) -> None:
    method = Coiecd(alpha, ratio, constraint)
    together = method.scores(*both)
    for row in range(len(together)):
        alone = method.scores(both[0][row : row + 1], both[1][row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)


@given(streams())
def test_a_certain_context_is_followed(both: Any) -> None:
    certain = both[0].clone()
    # Far above what the other stream could add: its own range.
    reach = float((both[1].amax(-1) - both[1].amin(-1)).max() + (certain.amax(-1) - certain.amin(-1)).max())
    certain[:, 1] = certain.amax(-1) + 10 * reach + 10
    assert (Coiecd(1.0, 4.0).scores(certain, both[1]).argmax(-1) == 1).all()


@settings(max_examples=60)
@given(streams(ruled_out=True), ALPHAS, RATIOS, st.sampled_from(["softmax", "band"]), st.booleans())
def test_what_is_ruled_out(both: Any, alpha: float, ratio: float, constraint: Any, swapped: bool) -> None:
    z2, z1 = both
    l2, l1 = z2.log_softmax(-1), z1.log_softmax(-1)
    method = Coiecd(alpha, ratio, constraint, swapped=swapped)
    lower, upper = method.sets(z2, z1)
    assert not ((lower | upper) & (z2 == -torch.inf)).any()
    scores = method.scores(z2, z1)
    assert not scores.isnan().any()
    assert not (scores == torch.inf).any()
    for row, word in [(r, w) for r in range(z2.shape[0]) for w in range(z2.shape[1])]:
        tau = alpha + 1 if bool(lower[row, word] | upper[row, word]) != swapped else alpha
        if z2[row, word] == -torch.inf:
            expected = -math.inf
        elif tau == 1:
            expected = float(z2[row, word])
        else:
            prior = float(l1[row, word])
            if prior == -math.inf and tau > 1:
                prior = float(l1[row][l1[row] > -torch.inf].min())
            mixed = tau * float(l2[row, word]) + (1 - tau) * prior
            expected = mixed + float(z2[row].logsumexp(-1))
        assert float(scores[row, word]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_padding_of_the_vocabulary_does_not_change_the_likely_set() -> None:
    z2 = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([z2, torch.full((3, 8), -1e4, dtype=z2.dtype)], dim=-1)
    assert torch.equal(bounds(padded, 4.0)[0][:, :50], bounds(z2, 4.0)[0])
    assert not bounds(padded, 4.0)[0][:, 50:].any()


def test_one_plausible_token_is_none_in_its_own_row_only() -> None:
    # p2 = (0.9, 0.06, 0.04) has one token above 0.9/4; (0.5, 0.44, 0.06) has two above 0.5/4.
    p2 = torch.tensor([[0.9, 0.06, 0.04], [0.5, 0.44, 0.06]], dtype=torch.float64)
    lower, upper = bounds(p2.log(), 4.0)
    assert lower.tolist() == [[False, False, False], [True, True, False]]
    assert upper.tolist() == [[False, True, True], [False, False, True]]


def test_bounds_are_strict() -> None:
    # Logits whose distances are exactly log 4 in floating point.
    step = math.log(4.0)
    lower, upper = bounds(torch.tensor([[0.0, -0.5, -step]], dtype=torch.float64), 4.0)
    assert lower.tolist() == [[True, True, False]]
    assert upper.tolist() == [[False, True, True]]


def test_the_band_by_hand() -> None:
    # H1 of the uniform distribution over four tokens is log 4 nats.
    z1 = torch.zeros(1, 4, dtype=torch.float64)
    p2 = torch.tensor([[0.7, 0.2, 0.0999, 0.0001]], dtype=torch.float64)
    shift = -p2.log() - math.log(4)
    for gamma in (0.5, 1.0, 3.0):
        lower, upper = band(p2.log(), z1, gamma)
        assert torch.equal(lower, shift <= -gamma)
        assert torch.equal(upper, shift >= gamma)
    assert float(entropy(z1.log_softmax(-1))) == pytest.approx(math.log(4))


def test_the_band_depends_on_the_entropy() -> None:
    z2 = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    flat, sharp = torch.zeros(1, 3, dtype=z2.dtype), torch.tensor([[0.0, 30.0, 0.0]], dtype=z2.dtype)
    assert band(z2, flat, 0.6)[0].tolist() != band(z2, sharp, 0.6)[0].tolist()


def test_names_of_sets() -> None:
    z2 = torch.tensor([[0.5, 0.4, 0.0999, 0.0001]], dtype=torch.float64).log()
    sets = Coiecd().explain(z2, torch.zeros_like(z2))
    assert {name: members[0].tolist() for name, members in sets.items()} == {
        LOWER: [True, True, False, False],
        UPPER: [False, False, False, True],
        CONFORMING: [False, False, True, False],
    }


@pytest.mark.parametrize("broken", [-math.inf, math.inf, math.nan])
def test_a_row_that_is_no_distribution_is_refused(broken: float) -> None:
    good, bad = torch.zeros(2, 3), torch.zeros(2, 3)
    bad[1] = broken
    with pytest.raises(UserError, match=r"the main prompt's logits of row 2 are no distribution"):
        Coiecd().scores(bad, good)
    with pytest.raises(UserError, match=r"the contrast prompt's logits of row 2 are no distribution"):
        Coiecd().scores(good, bad)


def test_streams_without_a_common_token_are_refused() -> None:
    z2, z1 = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    with pytest.raises(UserError, match="row 1 have no possible token in common"):
        Coiecd(alpha=0.5, ratio=1.0).scores(z2, z1)


def test_nothing_is_changed_in_place() -> None:
    z2, z1 = torch.randn(2, 9), torch.randn(2, 9)
    before = z2.clone(), z1.clone()
    Coiecd().scores(z2, z1)
    assert torch.equal(z2, before[0])
    assert torch.equal(z1, before[1])
