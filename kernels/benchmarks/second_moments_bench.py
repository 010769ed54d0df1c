"""Second moments of one batch added to a sum in fp32: ours, and the whole product in PyTorch.

The floor counts one reading of the inputs, one update of the sum, and half a product's arithmetic, which in PyTorch is
done in fp32 whatever the inputs are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from graftwork_kernels.second_moments import add_second_moments_, second_moments_reference
from harness import Case, compiled


def cases(device: torch.device, *, quick: bool) -> Iterable[Case]:
    """Yield one batch per width and dtype; a tenth of its tokens is padding."""
    large = device.type == "cuda" and not quick
    shapes = [(16384, 4096), (16384, 576)] if large else [(512, 576), *([] if quick else [(1024, 1536)])]
    for tokens, width in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(tokens, width, device=device).to(dtype)
            mask = torch.arange(tokens, device=device) % 10 != 0
            own, other = (torch.zeros(width, width, device=device) for _ in range(2))

            def eager(other: torch.Tensor = other, x: torch.Tensor = x, mask: torch.Tensor = mask) -> object:
                x = x[mask].float()
                return other.addmm_(x.T, x)

            sides = {
                "ours": lambda own=own, x=x, mask=mask: add_second_moments_(own, x, mask),
                "eager": eager,
            }
            if device.type == "cuda":
                whole = compiled(second_moments_reference)
                # Where rows are taken by a mask a graph breaks, so without one.
                sides["compile, no padding"] = lambda other=other, x=x, whole=whole: whole(other, x)
            yield Case(
                "second_moments",
                f"{tokens} x {width}",
                dtype,
                sides,
                x.element_size() * tokens * width + 8 * width * width,
                tokens * width * (width + 1),
            )
