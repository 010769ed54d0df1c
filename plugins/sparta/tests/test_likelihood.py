"""Likelihood scoring reads a prompt once: the gates of that pass must stay for every label read after it.

The lineage router over all tokens (``lineage_pool: all``) is left out: its gates look at whatever a pass reads,
so they are others with a cache than without, here as in generation.
"""

from __future__ import annotations

import pytest
import torch
from graftwork.evaluate.likelihood import label_likelihoods
from graftwork.testing.likelihood import naive_label_likelihoods
from graftwork.testing.models import tiny_tokenizer
from graftwork_sparta import prompt_context

PROMPTS = ["a", "what is this", "x" * 30, "Option: yes, no \nAnswer:"]
LABELS = ["no", "not", "very good", "very bad"]


@pytest.mark.parametrize("router", ["prompt", "lineage"])
@pytest.mark.parametrize("inside", [True, False])
def test_gates_are_those_of_the_prompt(adapt, inside: bool, router: str) -> None:
    model = adapt("llama", dtype=torch.float64, router=router, lineage_pool="prompt")
    context = prompt_context(model)

    def contexts():
        return [context.generation()] if inside else []

    naive = naive_label_likelihoods(model, tiny_tokenizer(), PROMPTS, LABELS, contexts=contexts)
    found = label_likelihoods(model, tiny_tokenizer(), PROMPTS, LABELS, batch_size=3, contexts=contexts)
    # Gates are computed in fp32.
    torch.testing.assert_close(found, naive, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        plain = label_likelihoods(model, tiny_tokenizer(), PROMPTS, LABELS)
    assert (plain - naive).abs().max() > 0.01
