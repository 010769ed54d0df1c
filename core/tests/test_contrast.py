"""The arithmetic of combiners against the formula, where streams rule tokens out and where they do not."""

from __future__ import annotations

import math

import pytest
import torch
from graftwork import UserError
from graftwork.generate.contrast import log_probabilities, log_ratio, tilt

INF = math.inf
MAIN = torch.tensor([[2.0, 1.0, 0.0, -INF]], dtype=torch.float64)
CONTRAST = torch.tensor([[0.0, 1.0, -INF, 3.0]], dtype=torch.float64)


@pytest.mark.parametrize("weight", [-1.0, -0.5, 0.5, 2.0])
def test_a_tilt_is_the_mixture_of_powers(weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    main, contrast = torch.randn(2, 3, 20, generator=generator, dtype=torch.float64)
    p, q = main.softmax(-1), contrast.softmax(-1)
    mixture = p ** (1 + weight) * q ** (-weight)
    found = tilt(main, contrast, weight).softmax(-1)
    torch.testing.assert_close(found, mixture / mixture.sum(-1, keepdim=True))


def test_weights_may_differ_by_token() -> None:
    weight = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    main, contrast = MAIN[:, :3].repeat(2, 1), torch.zeros(2, 3, dtype=torch.float64)
    found = tilt(main, contrast, weight[:, :3])
    gain = main.log_softmax(-1) - contrast.log_softmax(-1)
    torch.testing.assert_close(found, main + weight[:, :3] * gain)


def test_weight_zero_is_main_bit_for_bit() -> None:
    main = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(tilt(main, main.roll(1), 0), main)
    assert torch.equal(tilt(MAIN, CONTRAST, 0.0), MAIN)
    assert torch.equal(tilt(MAIN, CONTRAST, torch.zeros(1, 1)), MAIN)


def test_what_only_the_contrast_rules_out() -> None:
    l2, l1 = MAIN.log_softmax(-1)[0], CONTRAST.log_softmax(-1)[0]
    least = min(float(value) for value in l1 if value > -INF)
    assert float(log_ratio(MAIN, CONTRAST)[0, 2]) == pytest.approx(float(l2[2]) - least)
    up, down = tilt(MAIN, CONTRAST, 1.0)[0], tilt(MAIN, CONTRAST, -0.5)[0]
    assert float(up[2]) == pytest.approx(float(MAIN[0, 2] + l2[2]) - least)
    assert float(down[2]) == -INF
    for scores, weight in ((up, 1.0), (down, -0.5)):
        assert float(scores[3]) == -INF
        assert not scores.isnan().any()
        for word in (0, 1):
            assert float(scores[word]) == pytest.approx(float(MAIN[0, word] + weight * (l2 - l1)[word]))


@pytest.mark.parametrize("broken", [-INF, INF, math.nan])
def test_rows_that_are_no_distribution(broken: float) -> None:
    good, bad = torch.zeros(3, 4), torch.zeros(3, 4)
    bad[2] = broken
    with pytest.raises(UserError, match="the main prompt's logits of row 3"):
        log_probabilities(bad, good)
    with pytest.raises(UserError, match="the contrast prompt's logits of row 3"):
        tilt(good, bad, 1.0)
    if broken != -INF:
        bad[2, 1:] = 0.0
        with pytest.raises(UserError, match="row 3"):
            log_ratio(bad, good)


def test_nothing_in_common() -> None:
    with pytest.raises(UserError, match="row 1 have no possible token in common"):
        tilt(torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]]), -0.5)
