"""A linear layer whose tokens take the weights of their routes, against dense copies of those weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from graftwork_kernels.masked_delta import masked_delta, pack_mask
from graftwork_kernels.masked_delta_linear import masked_delta_linear, masked_delta_linear_reference
from harness import Case, compiled


def cases(device: torch.device, *, quick: bool) -> Iterable[Case]:
    """Yield decoding (a token) and a prompt of three routes.

    "dense" is a plain product with one copy of the weights in memory per route: what the op saves. It moves half of
    what the op has to.
    """
    cuda = device.type == "cuda"
    outputs, inputs = (64, 96) if quick else (14336, 4096) if cuda else (1536, 576)
    prompt = 2048 if cuda and not quick else 96
    for dtype in (torch.bfloat16,) if cuda else (torch.float32,):
        weight = torch.randn(outputs, inputs, device=device).to(dtype) / inputs**0.5
        delta = torch.randn(outputs, inputs, device=device).to(dtype) / 100
        words = torch.stack([pack_mask(torch.rand(outputs, inputs, device=device) < 0.3) for _ in range(3)])
        dense = [masked_delta(weight, delta, one) for one in words]
        for tokens, used in ((1, 1), (prompt, 3)):
            x = torch.randn(tokens, inputs, device=device).to(dtype)
            routes = torch.arange(tokens, device=device) * used // tokens
            parts = list(x.tensor_split(used))
            calls = (x, weight, delta, words, routes)
            sides = {
                "ours": lambda calls=calls: masked_delta_linear(*calls),
                "eager": lambda calls=calls: masked_delta_linear_reference(*calls),
                "dense": lambda parts=parts, dense=dense: torch.cat(
                    [part @ one.t() for part, one in zip(parts, dense, strict=False)]
                ),
            }
            if cuda:
                whole = compiled(masked_delta_linear_reference)
                sides["compile"] = lambda calls=calls, whole=whole: whole(*calls)
            moved = 2 * weight.numel() * dtype.itemsize + 4 * used * words[0].numel()
            moved += tokens * (inputs + outputs) * dtype.itemsize
            name = f"{tokens} tokens, {used} of 3 routes, {outputs} x {inputs}"
            yield Case("masked_delta_linear", name, dtype, sides, moved, 2.0 * tokens * weight.numel())
