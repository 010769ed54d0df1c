"""D3 on a real model: how much of what fewer layers can save is saved, and what it costs when it saves nothing."""

from __future__ import annotations

from typing import Any

import pytest
from decoding import PROMPT, UNIT, bundled, seconds, with_plugin
from measured import in_pairs

pytestmark = pytest.mark.slow
TOKENS, RATIO, SHARE = 256, 0.67, 0.9


def test_tokens_per_second_against_the_bound(record: Any) -> None:
    """At mean depth 0.67, the time is at most the full model's divided by 90 % of the bound."""
    from graftwork_d3 import cost_of

    model, tokenizer = bundled()
    # The prompt's pass has all layers; the 255 that follow have the mean depth.
    depth = with_plugin(model, "d3", {"target_ratio": RATIO, "expected_tokens": TOKENS - 1})
    bound = cost_of(model, TOKENS // 2).bound(RATIO)
    sides = in_pairs(
        lambda: seconds(model, tokenizer, [PROMPT], TOKENS, depth)[0],
        lambda: seconds(model, tokenizer, [PROMPT], TOKENS)[0],
        pairs=5,
        label="D3 at mean depth 0.67",
    )
    record(
        "depth_speed",
        (f"D3, mean depth {RATIO}, {TOKENS} tokens (bound {bound:.3f} times as fast)", sides[0]),
        ("all layers", sides[1]),
        limit=1 / (SHARE * bound),
        unit=UNIT,
    )


def test_the_cost_of_leaving_nothing_out(record: Any) -> None:
    model, tokenizer = bundled()
    off = with_plugin(model, "d3", {"alpha": 1.0})
    count = 32
    written = [seconds(model, tokenizer, [PROMPT], count, one)[1] for one in (off, None)]
    assert written[0] == written[1]
    sides = in_pairs(
        lambda: seconds(model, tokenizer, [PROMPT], count, off)[0],
        lambda: seconds(model, tokenizer, [PROMPT], count)[0],
        pairs=25,
        label="D3 with nothing left out",
    )
    record(
        "depth_speed",
        (f"D3, alpha 1, {count} tokens", sides[0]),
        ("without the plugin", sides[1]),
        limit=1.02,
        unit=UNIT,
    )
