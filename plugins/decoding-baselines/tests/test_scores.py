"""Every baseline's scores against its plain formula in float64, with tokens that either stream rules out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork_decoding_baselines.adacad import adacad_scores
from graftwork_decoding_baselines.cad import cad_scores
from graftwork_decoding_baselines.contrastive import contrastive_scores, plausible
from graftwork_decoding_baselines.divergence import jensen_shannon
from graftwork_decoding_baselines.dola import candidates, dola_scores
from graftwork_decoding_baselines.interpolation import interpolation_scores
from graftwork_decoding_baselines.prior import prior_scores
from hypothesis import given, settings
from hypothesis import strategies as st

INF = math.inf
few = settings(max_examples=50)


@st.composite
def streams(draw: Any, ruled_out: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Two streams of logits, B x V; token 0 is possible in both."""
    rows, words = draw(st.integers(1, 3)), draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0, 30.0]))
    both = scale * torch.randn(2, rows, words, generator=generator, dtype=torch.float64)
    gone = torch.rand(both.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    gone[..., 0] = False
    if ruled_out:
        both[gone] = -torch.inf
    return both[0], both[1]


def rows(logits: torch.Tensor) -> list[list[float]]:
    """Log-probabilities in plain Python."""
    found = []
    for row in logits.tolist():
        top = max(row)
        total = top + math.log(math.fsum(math.exp(value - top) for value in row))
        found.append([value - total for value in row])
    return found


def mixed(l2: float, l1: float, tau: float, least: float) -> float:
    """``tau l2 + (1 - tau) l1`` where one of them may be impossible."""
    if l2 == -INF:
        return -INF
    if tau == 1:
        return l2
    if l1 == -INF:
        return -INF if tau < 1 else tau * l2 + (1 - tau) * least
    return tau * l2 + (1 - tau) * l1


def expected(both: Any, tau: Any) -> torch.Tensor:
    """The power mixture of every row, ``tau(p2, p1)`` being its exponent, normalised."""
    result = []
    for l2, l1 in zip(rows(both[0]), rows(both[1]), strict=True):
        exponent = tau(l2, l1)
        least = min(value for value in l1 if value > -INF)
        result.append([mixed(a, b, exponent, least) for a, b in zip(l2, l1, strict=True)])
    return torch.tensor(result, dtype=torch.float64).log_softmax(-1)


def divergence(l2: list[float], l1: list[float]) -> float:
    """The Jensen-Shannon divergence in nats, by its definition."""
    total = 0.0
    for a, b in zip(l2, l1, strict=True):
        p, q = math.exp(a), math.exp(b)
        middle = (p + q) / 2
        total += 0.5 * sum(x * math.log(x / middle) for x in (p, q) if x > 0)
    return total


@few
@given(streams(), st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_cad(both: Any, alpha: float) -> None:
    scores = cad_scores(*both, alpha)
    torch.testing.assert_close(scores.log_softmax(-1), expected(both, lambda *_: 1 + alpha))
    if alpha == 0:
        assert torch.equal(scores, both[0])


@few
@given(streams(), st.sampled_from([0.0, 0.3]))
def test_adacad(both: Any, floor: float) -> None:
    scores = adacad_scores(*both, floor)
    wanted = expected(both, lambda l2, l1: 1 + max(divergence(l2, l1), floor))
    torch.testing.assert_close(scores.log_softmax(-1), wanted, atol=1e-9, rtol=1e-9)


@few
@given(streams(), st.sampled_from([0.25, 0.75, 1.0]))
def test_interpolation(both: Any, weight: float) -> None:
    scores = interpolation_scores(*both, weight)
    torch.testing.assert_close(scores.log_softmax(-1), expected(both, lambda *_: weight))
    if weight == 1:
        assert torch.equal(scores, both[0])


@few
@given(streams(ruled_out=False))
def test_prior_is_what_interpolation_ends_at(both: Any) -> None:
    assert torch.equal(prior_scores(*both), both[1])
    torch.testing.assert_close(interpolation_scores(*both, 0.0).log_softmax(-1), both[1].log_softmax(-1))


@few
@given(streams(), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from([0.5, 1.0, 2.0]))
def test_contrastive_decoding(both: Any, share: float, temperature: float) -> None:
    scores = contrastive_scores(*both, share, temperature)
    amateur = rows(both[1] / temperature)
    for row, (le, la) in enumerate(zip(rows(both[0]), amateur, strict=True)):
        least = min(value for value in la if value > -INF)
        shift = None
        for word, (a, b) in enumerate(zip(le, la, strict=True)):
            ratio = math.exp(a - max(le))
            if abs(ratio - share) < 1e-9 and share < 1:
                continue
            if a == -INF or ratio < share:
                assert scores[row, word] == -INF
                continue
            value = a - max(b, least)
            shift = float(scores[row, word]) - value if shift is None else shift
            assert float(scores[row, word]) == pytest.approx(value + shift, abs=1e-9)
        assert shift is not None


def test_the_likeliest_token_is_all_that_is_left_at_full_plausibility() -> None:
    expert, amateur = torch.randn(4, 20), torch.randn(4, 20)
    assert torch.equal(plausible(expert, 1.0).sum(-1), torch.ones(4, dtype=torch.long))
    assert torch.equal(contrastive_scores(expert, amateur, 1.0).argmax(-1), expert.argmax(-1))


@few
@given(streams())
def test_rows_do_not_know_of_each_other(both: Any) -> None:
    for scores in (cad_scores(*both, 1.0), adacad_scores(*both), contrastive_scores(*both)):
        assert not scores.isnan().any()
        assert not (scores == INF).any()
    together = adacad_scores(*both)
    for row in range(len(together)):
        alone = adacad_scores(both[0][row : row + 1], both[1][row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)


@few
@given(streams())
def test_jensen_shannon(both: Any) -> None:
    found = jensen_shannon(both[0].log_softmax(-1), both[1].log_softmax(-1))
    wanted = [[divergence(l2, l1)] for l2, l1 in zip(rows(both[0]), rows(both[1]), strict=True)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-12, rtol=1e-9)
    assert torch.equal(found, jensen_shannon(both[1].log_softmax(-1), both[0].log_softmax(-1)))


def test_jensen_shannon_at_its_ends() -> None:
    apart = torch.tensor([[0.0, -INF], [-INF, 0.0]], dtype=torch.float64)
    assert float(jensen_shannon(apart[:1], apart[1:])) == pytest.approx(math.log(2))
    assert float(jensen_shannon(apart[:1], apart[:1])) == 0


@few
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 0.5]))
def test_dola_chooses_per_row_and_scores_by_the_formula(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    last = 3 * torch.randn(3, 9, generator=generator, dtype=torch.float64)
    early = 3 * torch.randn(4, 3, 9, generator=generator, dtype=torch.float64)
    scores, chosen = dola_scores(last, early, share)
    candidate_rows = [rows(one) for one in early]
    for row, mature in enumerate(rows(last)):
        distances = [divergence(mature, layer[row]) for layer in candidate_rows]
        premature = distances.index(max(distances))
        assert int(chosen[row]) == premature
        for word, value in enumerate(mature):
            if math.exp(value - max(mature)) < share:
                assert scores[row, word] == -INF
            else:
                wanted = value - candidate_rows[premature][row][word]
                assert float(scores[row, word]) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    ("layers", "depth", "tied", "found"),
    [
        ("low", 32, False, list(range(0, 16, 2))),
        ("low", 30, True, list(range(2, 15, 2))),
        ("high", 32, False, list(range(16, 32, 2))),
        ("high", 60, False, list(range(40, 60, 2))),
        ("low", 60, False, list(range(0, 20, 2))),
        ([0, 3], 4, True, [0, 3]),
    ],
)
def test_candidate_layers(layers: Any, depth: int, tied: bool, found: list[int]) -> None:
    assert candidates(layers, depth, tied) == found


@pytest.mark.parametrize("layers", [[4], [-1], [1, 1]])
def test_layers_that_are_refused(layers: list[int]) -> None:
    with pytest.raises(UserError, match="name different layers from 0 to 3"):
        candidates(layers, 4, False)


@pytest.mark.parametrize("layers", ["low", []])
def test_no_candidate_is_refused(layers: Any) -> None:
    with pytest.raises(UserError, match="leaves no candidate in a model of 2 layers"):
        candidates(layers, 2, True)


def test_streams_without_a_common_token() -> None:
    z2, z1 = torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]])
    for scores in (lambda: prior_scores(z2, z1), lambda: interpolation_scores(z2, z1, 0.5)):
        with pytest.raises(UserError, match="row 1 have no possible token in common"):
            scores()
