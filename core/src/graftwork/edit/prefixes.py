"""Short openings that the model itself writes, to put before a prompt: an edit is to hold wherever it stands."""

from __future__ import annotations

from typing import Any

import torch

OPENINGS = ("The", "Therefore", "Because", "I", "You")
"""What the openings begin with, in turn (MEMIT's code)."""


def generate_prefixes(
    model: Any, tokenizer: Any, count: int, tokens: int = 10, seed: int = 0
) -> tuple[str, ...]:
    """Return ``count`` openings of about ``tokens`` tokens, each drawn from the five likeliest tokens at every step.

    They end with a full stop and a space. The same seed gives the same openings.
    """
    generator = torch.Generator().manual_seed(seed)
    device = model.get_input_embeddings().weight.device
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.long, device=device)
    found: list[str] = []
    with torch.no_grad():
        for number in range(count):
            ids = list(tokenizer(OPENINGS[number % len(OPENINGS)], verbose=False)["input_ids"])
            for _ in range(tokens):
                logits = (
                    model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -1].float()
                )
                logits[special] = -torch.inf
                values, best = logits.topk(5)
                chosen = torch.multinomial(values.softmax(0).cpu(), 1, generator=generator)
                ids.append(int(best[int(chosen)]))
            text = tokenizer.decode(ids, skip_special_tokens=True)
            # One line: a break would read as the end of a document.
            found.append(" ".join(text.split()).rstrip(".") + ". ")
    return tuple(found)
