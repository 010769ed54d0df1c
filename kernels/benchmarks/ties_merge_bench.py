"""TIES over several vectors in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from graftwork_kernels.ties_merge import ties_merge, ties_merge_reference
from harness import Case, compiled


def cases(device: torch.device, *, quick: bool) -> Iterable[Case]:
    """Yield three and eight vectors; on a CPU as many entries as the merge reads at a time."""
    cuda = device.type == "cuda"
    entries = 2**12 if quick else 2**26 if cuda else 2**16
    for count, how in ((3, "mean"), (8, "sum")):
        deltas = torch.randn(count, entries, device=device) / 100
        options: dict[str, Any] = {"thresholds": [0.013] * count, "how": how}
        sides = {
            "ours": lambda deltas=deltas, options=options: ties_merge(deltas, **options),
            "eager": lambda deltas=deltas, options=options: ties_merge_reference(deltas, **options),
        }
        if cuda:
            whole = compiled(ties_merge_reference)
            sides["compile"] = lambda deltas=deltas, options=options, whole=whole: whole(deltas, **options)
        moved = 4.0 * (count + 1) * entries
        yield Case("ties_merge", f"{count} x {entries}, {how}", torch.float32, sides, moved)
