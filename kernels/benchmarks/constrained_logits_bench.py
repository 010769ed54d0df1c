"""COIECD's scores of a decoding step from the logits with and without a context."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from graftwork_kernels.constrained_logits import constrained_logits, constrained_logits_reference
from harness import Case, compiled

# Rows and words: one text and a batch, of SmolLM2's and of Llama 3's vocabulary.
SHAPES, QUICK = [(1, 49152), (32, 49152), (1, 128256), (32, 128256)], [(2, 3000)]


def cases(device: torch.device, *, quick: bool) -> Iterable[Case]:
    """Yield the cases; logits of a decode loop are float32."""
    dtype = torch.float32
    sides: dict[str, Callable[..., object]] = {
        "ours": constrained_logits,
        "eager": constrained_logits_reference,
    }
    if device.type == "cuda":
        sides["compile"] = compiled(constrained_logits_reference)
    for rows, words in QUICK if quick else SHAPES:
        main, contrast = (3 * torch.randn(2, rows, words, device=device, dtype=dtype)).unbind()
        yield Case(
            "constrained_logits",
            f"B{rows} V{words}",
            dtype,
            {
                name: lambda side=side, main=main, contrast=contrast: side(main, contrast)
                for name, side in sides.items()
            },
            # Read both rows, write one.
            bytes_moved=3 * rows * words * dtype.itemsize,
        )
