"""Likelihood scoring against the plain loop: one forward pass for every item and label.

The plain loop reads a prompt once per label; ours reads it once, with other prompts, and the labels on top of its
cache. So the more labels, the more is saved. Both find the same likelihoods, which is checked here too.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted import MODEL
from graftwork.evaluate.likelihood import label_likelihoods
from graftwork.testing.likelihood import naive_label_likelihoods
from graftwork.testing.models import tiny_model, tiny_tokenizer
from measured import in_pairs

pytestmark = pytest.mark.slow
# Tokens are bytes here. A blank, a label of three and the end: as many as a label of several words has elsewhere.
ITEMS, SHORTEST, LONGEST, LABEL = 8, 64, 128, 3
SHAPE = (
    f"{MODEL['num_hidden_layers']} layers of {MODEL['hidden_size']}, prompts of {SHORTEST}-{LONGEST} tokens"
)


@pytest.mark.parametrize(("labels", "limit"), [(4, 0.5), (14, 0.25)])
def test_items_per_second(record: Any, labels: int, limit: float) -> None:
    """The plain loop's items per second as a share of ours. ``limit`` is what it may be at most."""
    generator = random.Random(0)

    def text(length: int) -> str:
        return "".join(generator.choices("abcdefgh ", k=length))

    names = sorted({text(LABEL) for _ in range(10 * labels)})
    names = generator.sample(names, labels)
    prompts = [text(generator.randint(SHORTEST, LONGEST)) for _ in range(ITEMS)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = tiny_model(**MODEL).to(device), tiny_tokenizer()
    found: dict[Callable[..., torch.Tensor], torch.Tensor] = {}

    def items_per_second(score: Callable[..., torch.Tensor]) -> float:
        started = time.perf_counter()
        # What comes back is on the CPU, so everything is done by then.
        found[score] = score(model, tokenizer, prompts, names)
        return ITEMS / (time.perf_counter() - started)

    sides = in_pairs(
        lambda: items_per_second(naive_label_likelihoods),
        lambda: items_per_second(label_likelihoods),
        pairs=5,
        label=f"scoring, {labels} labels",
    )
    naive, ours = found[naive_label_likelihoods], found[label_likelihoods]
    torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-4)
    record(
        "scoring_speed",
        (f"one pass per label, {labels} labels, {SHAPE}", sides[0]),
        ("prompts read once", sides[1]),
        limit=limit,
        unit="items/s",
    )
