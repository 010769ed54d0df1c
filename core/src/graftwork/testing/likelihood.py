"""The plain way to find how likely labels are: one whole forward pass for every prompt and label."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from graftwork.evaluate.encoding import Contexts
from graftwork.evaluate.likelihood import question
from graftwork.evaluate.modes import evaluating


def naive_label_likelihoods(
    model: Any, tokenizer: Any, prompts: Sequence[Any], labels: Sequence[str], *, contexts: Contexts = tuple
) -> torch.Tensor:
    """Return what :func:`graftwork.evaluate.likelihood.label_likelihoods` does: no batches, padding or cache.

    The answer's place is told by ``labels`` as in training, for models that treat prompts apart.
    """
    rows = []
    with evaluating(model):
        for prompt in prompts:
            asked = question(tokenizer, prompt, labels)
            row = []
            for answer in asked.answers:
                ids = torch.tensor([[*asked.prompt, *answer]], device=model.device)
                marked = ids.clone()
                marked[:, : len(asked.prompt)] = -100
                with contextlib.ExitStack() as stack:
                    for context in contexts():
                        stack.enter_context(context)
                    logits = model(input_ids=ids, labels=marked, use_cache=False).logits
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                predicted = logits[0, len(asked.prompt) - 1 : -1].log_softmax(-1)
                row.append(predicted.gather(1, ids[0, len(asked.prompt) :, None]).sum())
            rows.append(torch.stack(row).cpu())
    return torch.stack(rows)
