"""Choosing by divergence and by score, and scoring many settings as rows of one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from graftwork import UserError
from graftwork.evaluate.answer_metrics import f1
from graftwork.generate import Decoding, Prompt, decode
from graftwork.testing.models import tiny_tokenizer
from graftwork_cale import NEUTRAL, LayerEnhancement, Setting, best, by_divergence, candidates, score_settings
from graftwork_cale.choose import settings as pairs_of
from hypothesis import given, settings
from hypothesis import strategies as st

TOKENIZER = tiny_tokenizer()
TEXTS = ["The sky is green. What colour is it?", "Rome lies in France. Where?", "a b"]
Lively = Callable[..., Any]


def test_candidates_leave_out_the_first_quarter_and_the_last_layer() -> None:
    assert list(candidates(30)) == list(range(8, 30))
    assert list(candidates(4)) == [2, 3]
    assert list(candidates(2)) == [1]
    with pytest.raises(UserError, match="1 layer has none"):
        candidates(1)


def test_growth_and_peak_of_a_curve() -> None:
    #      1    2    3    4    5    6    7    8
    kl = [0.0, 9.0, 9.5, 9.6, 8.0, 9.0, 9.7, 20.0]
    assert (
        by_divergence(kl, "growth") == 6
    )  # the rise at 2 is in the first quarter, that at 8 is the last layer
    assert by_divergence(kl, "peak") == 7
    assert by_divergence([1.0, 5.0], "growth") == 1
    assert by_divergence([1.0, 2.0, 3.0, 4.0], "growth") == 2


@settings(max_examples=100)
@given(kl=st.lists(st.floats(0, 10), min_size=2, max_size=40))
def test_the_choice_is_the_argmax_over_candidates(kl: list[float]) -> None:
    rises = {layer: kl[layer - 1] - (kl[layer - 2] if layer > 1 else 0) for layer in candidates(len(kl))}
    assert rises[by_divergence(kl, "growth")] == max(rises.values())
    assert kl[by_divergence(kl, "peak") - 1] == max(kl[layer - 1] for layer in candidates(len(kl)))


def test_the_neutral_setting_takes_part_and_wins_ties() -> None:
    tried = pairs_of([8, 9], [1.0, 1.5, 2.0])
    assert tried == [NEUTRAL, (8, 1.5), (8, 2.0), (9, 1.5), (9, 2.0)]
    assert best(dict.fromkeys(tried, 0.3)) == NEUTRAL
    assert best({**dict.fromkeys(tried, 0.3), Setting(9, 2.0): 0.31}) == (9, 2.0)
    assert best({**dict.fromkeys(tried, 0.4), NEUTRAL: 0.3}) == (8, 1.5)


@settings(max_examples=100)
@given(values=st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=5, max_size=5))
def test_no_setting_scores_better_than_the_best(values: list[float]) -> None:
    scores = dict(zip(pairs_of([8, 9], [1.5, 0.5]), values, strict=True))
    chosen = best(scores)
    assert scores[chosen] == max(values)
    assert chosen == NEUTRAL or scores[NEUTRAL] < max(values)


def one_by_one(model: Any, setting: Setting, text: str, positions: Any, variant: Any) -> str:
    """Answer one prompt under one setting, with core's loop."""
    decoding = Decoding()
    if setting.layer is not None:
        one = LayerEnhancement(model, setting.layer, setting.strength, variant, positions)
        decoding = Decoding(before_forward=[one.before_forward], contexts=lambda: [one])
    tokens = decode(
        model, [Prompt(text)], tokenizer=TOKENIZER, decoding=decoding, max_new_tokens=6, do_sample=False
    )[0]
    return TOKENIZER.decode(tokens, skip_special_tokens=True).strip().split("\n")[0].rstrip()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("positions", "variant"), [("predicting", "amplify"), ("predicting", "residual"), ("all", "growth")]
)
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_settings_as_rows_are_settings_one_by_one(
    lively: Lively, kind: str, positions: Any, variant: Any, rows: int
) -> None:
    model = lively(kind)
    tried = pairs_of([2, 3], [1.5, 3.0])
    answers = [[one_by_one(model, setting, text, positions, variant) for text in TEXTS] for setting in tried]
    assert len({tuple(row) for row in answers}) > 1
    prompts = [TOKENIZER(text)["input_ids"] for text in TEXTS]
    # Gold answers are what one setting writes, so scores tell which setting wrote what.
    for gold in (0, 3):
        found = score_settings(
            model,
            TOKENIZER,
            prompts,
            [[text] for text in answers[gold]],
            tried,
            variant=variant,
            positions=positions,
            max_new_tokens=6,
            rows=rows,
        )
        assert found == [
            [f1(text, [right]) for text, right in zip(row, answers[gold], strict=True)] for row in answers
        ]


def test_a_prompt_of_one_token(lively: Lively) -> None:
    model = lively()
    found = score_settings(model, TOKENIZER, [[20]], [["x"]], pairs_of([2], [1.5]), max_new_tokens=2)
    assert found == [[0.0], [0.0]]
