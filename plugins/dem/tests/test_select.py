"""The choice of places: how many, of which kinds, never against the target; weights that move all of the residual."""

from __future__ import annotations

import math

import pytest
import torch
from graftwork.edit.errors import LocalizationError
from graftwork.edit.sites import KINDS
from graftwork_dem.dispersion import dispersion, rank_correlation
from graftwork_dem.select import default_deepest, parse_place, remaining_share, select
from hypothesis import given
from hypothesis import strategies as st

MAPS = st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=12).map(
    lambda rows: torch.tensor(rows, dtype=torch.float64)
)


@given(
    scores=MAPS, n=st.integers(1, 8), attn=st.integers(0, 4), mlp=st.integers(0, 4), deep=st.integers(0, 12)
)
def test_a_choice_keeps_its_promises(scores: torch.Tensor, n: int, attn: int, mlp: int, deep: int) -> None:
    if attn + mlp > n:
        n = attn + mlp
    allowed = scores[: deep + 1]
    positive = [int((allowed[:, kind] > 0).sum()) for kind in range(2)]
    if not sum(positive):
        with pytest.raises(LocalizationError, match="positive score"):
            select(scores, n_sites=n, min_attn=attn, min_mlp=mlp, deepest=deep)
        return
    omega = select(scores, n_sites=n, min_attn=attn, min_mlp=mlp, deepest=deep)
    assert len(omega) == min(n, sum(positive))
    assert all(layer <= deep for layer, _ in omega)
    assert all(float(scores[layer, KINDS.index(kind)]) > 0 for layer, kind in omega)
    for number, (kind, least) in enumerate(zip(KINDS, (attn, mlp), strict=True)):
        assert sum(one == kind for _, one in omega) >= min(least, positive[number])
    assert math.fsum(omega.values()) == pytest.approx(1)
    assert list(omega) == sorted(omega, key=lambda one: (one[0], KINDS.index(one[1])))
    # Without minima nothing that was left out is higher than what was taken.
    free = select(scores, n_sites=n, deepest=deep)
    taken = min(float(scores[layer, KINDS.index(kind)]) for layer, kind in free)
    left = [
        float(allowed[layer, number])
        for layer in range(len(allowed))
        for number in range(2)
        if (layer, KINDS[number]) not in free
    ]
    assert all(value <= taken for value in left)


def test_weights_follow_scores_or_are_even() -> None:
    scores = torch.tensor([[3.0, 1.0], [0.0, 4.0]])
    assert select(scores, n_sites=2, deepest=1) == {(0, "attn"): 3 / 7, (1, "mlp"): 4 / 7}
    assert select(scores, n_sites=2, deepest=1, weights="uniform") == {(0, "attn"): 0.5, (1, "mlp"): 0.5}


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(LocalizationError, match="no number"):
        select(torch.tensor([[1.0, math.nan]]), n_sites=1)


def test_the_deepest_layer_is_at_six_tenths() -> None:
    assert [default_deepest(layers) for layers in (1, 2, 12, 30)] == [0, 1, 7, 18]


@given(weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
def test_shares_of_what_remains_move_all_of_it_as_pi_says(weights: list[float]) -> None:
    total = sum(weights)
    omega = {(layer, KINDS[layer % 2]): weight / total for layer, weight in enumerate(weights)}
    rest, moved = 1.0, []
    for place in omega:
        step = rest * remaining_share(omega, place)
        moved.append(step)
        rest -= step
    assert rest == pytest.approx(0, abs=1e-12)
    assert moved == pytest.approx([*omega.values()])


def test_places_are_read_and_mistakes_told() -> None:
    assert parse_place("attn.7") == (7, "attn")
    for wrong in ("attn", "mlp.x", "7.mlp", "conv.1", "mlp.-1"):
        with pytest.raises(ValueError, match="no site"):
            parse_place(wrong)


def test_dispersion_at_its_ends() -> None:
    even, one = dispersion(torch.ones(5, 2)), dispersion(torch.eye(5)[:, :2] * torch.tensor([0.0, 3.0]))
    assert even is not None
    assert one is not None
    assert (even.entropy, even.attention, even.top) == pytest.approx((1, 0.5, 0.5))
    assert even.spread == pytest.approx(10)
    assert (one.entropy, one.attention, one.top, one.spread) == pytest.approx((0, 0, 1, 1))
    assert dispersion(-torch.ones(3, 2)) is None
    assert dispersion(torch.tensor([[math.nan, 1.0]])) is None


@given(scores=MAPS, factor=st.floats(0.1, 10))
def test_dispersion_knows_no_scale_and_no_negative_scores(scores: torch.Tensor, factor: float) -> None:
    found, scaled = dispersion(scores), dispersion(factor * scores.clamp(min=0))
    if found is None or scaled is None:
        assert not bool((scores > 1e-300).any()) or found is not None
        return
    assert scaled.entropy == pytest.approx(found.entropy, abs=1e-9)
    assert scaled.attention == pytest.approx(found.attention, abs=1e-9)
    assert 0 <= found.entropy <= 1 + 1e-12


def test_rank_correlation_is_spearmans() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, a**3) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: Pearson's correlation of these.
    assert rank_correlation(torch.tensor([0.0, 5.0, 5.0, 9.0]), a) == pytest.approx(0.9486833)
    assert rank_correlation(torch.ones(4), a) is None
