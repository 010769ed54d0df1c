"""The decode loop of two prompts on a real model, against decoding them apart and against a plain batch of two."""

from __future__ import annotations

from typing import Any

import pytest
from decoding import PROMPT, UNIT, bundled, seconds, with_plugin
from graftwork import Combiner
from graftwork.generate import Decoding, Prompt
from measured import in_pairs

pytestmark = pytest.mark.slow
TOKENS, PAIRS = 32, 7
# A contrast of both prompts; both have about the same length here, so that only the loop differs.
CONTRAST = Decoding(Combiner("contrast", lambda main, contrast: 1.5 * main - 0.5 * contrast))
ALONE = Prompt(str(PROMPT.contrast))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_pass_for_both_prompts(record: Any, dtype: str) -> None:
    """At least 1.6 times as fast as generating for each prompt, and at most 1.15 times a plain batch of both.

    Where products of two rows take nearly twice as long as those of one, as float32 ones do on some CPUs, the first
    is missed by any loop: the plain batch beside it shows what there was to gain.
    """
    model, tokenizer = bundled(dtype)

    def paired() -> float:
        return seconds(model, tokenizer, [PROMPT], TOKENS, CONTRAST)[0]

    def apart() -> float:
        return sum(seconds(model, tokenizer, [one], TOKENS)[0] for one in (Prompt(PROMPT.main), ALONE))

    def batch() -> float:
        return seconds(model, tokenizer, [Prompt(PROMPT.main), ALONE], TOKENS)[0]

    subject = f"paired loop, one item, {TOKENS} tokens, {dtype}"
    two = in_pairs(paired, apart, pairs=PAIRS, label=f"paired against apart, {dtype}")
    rows = in_pairs(paired, batch, pairs=PAIRS, label=f"paired against a batch, {dtype}")
    # Both rows are written, whichever of them misses its limit.
    try:
        record("paired_speed", (subject, two[0]), ("two generate calls", two[1]), limit=1 / 1.6, unit=UNIT)
    finally:
        record("paired_speed", (subject, rows[0]), ("plain, two rows", rows[1]), limit=1.15, unit=UNIT)


def test_enhancing_a_layer(record: Any) -> None:
    model, tokenizer = bundled()
    enhanced = with_plugin(model, "cale", {"layer": 15, "strength": 1.5})
    sides = in_pairs(
        lambda: seconds(model, tokenizer, [PROMPT], TOKENS, enhanced)[0],
        lambda: seconds(model, tokenizer, [PROMPT], TOKENS)[0],
        pairs=15,
        label="CaLE",
    )
    record("paired_speed", (f"CaLE, {TOKENS} tokens", sides[0]), ("plain", sides[1]), limit=1.03, unit=UNIT)
