"""A base with what a mask keeps of a difference, and packing a mask."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from graftwork_kernels.masked_delta import (
    masked_delta,
    masked_delta_reference,
    pack_mask,
    pack_mask_reference,
)
from harness import Case, compiled


def cases(device: torch.device, *, quick: bool) -> Iterable[Case]:
    """Yield matrices as large models have them (a GPU), or as small ones do (a CPU)."""
    cuda = device.type == "cuda"
    rows, columns = (256, 256) if quick else (16384, 8192) if cuda else (1536, 576)
    for dtype in (torch.bfloat16, torch.float32):
        base = torch.randn(rows, columns, device=device).to(dtype)
        delta = torch.randn(rows, columns, device=device).to(dtype) / 100
        words = pack_mask_reference(torch.rand(rows, columns, device=device) < 0.3)
        calls = (base, delta, words)
        sides = {
            "ours": lambda calls=calls: masked_delta(*calls),
            "eager": lambda calls=calls: masked_delta_reference(*calls),
        }
        if cuda:
            whole = compiled(masked_delta_reference)
            sides["compile"] = lambda calls=calls, whole=whole: whole(*calls)
        moved = 3 * base.numel() * dtype.itemsize + 4 * words.numel()
        yield Case("masked_delta", f"add {rows} x {columns}", dtype, sides, moved)
    mask = torch.rand(rows, columns, device=device) < 0.3
    sides = {"ours": lambda: pack_mask(mask), "eager": lambda: pack_mask_reference(mask)}
    if cuda:
        packed = compiled(pack_mask_reference)
        sides["compile"] = lambda: packed(mask)
    yield Case("masked_delta", f"pack {rows} x {columns}", torch.bool, sides, mask.numel() * 9 / 8)
