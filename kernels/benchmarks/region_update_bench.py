"""A region's change added to a layer's output: ours, and ``index_add_`` of a product in PyTorch.

The floor counts one reading and writing of the changed columns of y, and one reading of x and of the change, or the
product's arithmetic. "step" is forward and backward, with the gather of the columns' gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from graftwork_kernels.region_update import region_update_
from harness import Case, compiled
from torch.nn import functional as F


def cases(device: torch.device, *, quick: bool) -> Iterable[Case]:
    """Yield the update and its training step, a twentieth of the neurons changed, per shape and dtypes of x and F."""
    large = device.type == "cuda" and not quick
    tokens, inputs, outputs = (8192, 4096, 11008) if large else (512, 576, 1536)
    kinds = (
        [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)] if device.type == "cuda" else []
    )
    for dtype, of_change in [*kinds, (torch.float32, torch.float32)]:
        yield _case(device, (tokens, inputs, outputs), dtype, of_change, False)
        yield _case(device, (tokens, inputs, outputs), dtype, of_change, True)


def _eager(y: torch.Tensor, x: torch.Tensor, change: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return y.index_add_(-1, rows, F.linear(x.to(change.dtype), change).to(y.dtype))


def _case(
    device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, of_change: torch.dtype, train: bool
) -> Case:
    tokens, inputs, outputs = shape
    neurons = outputs // 20
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(outputs, generator=generator)[:neurons].sort().values.to(device, torch.int32)
    x = torch.randn(tokens, inputs, generator=generator).to(device, dtype).requires_grad_(train)
    change = (
        (0.01 * torch.randn(neurons, inputs, generator=generator)).to(device, of_change).requires_grad_(train)
    )
    y = torch.randn(tokens, outputs, generator=generator).to(device, dtype)
    push = torch.randn_like(y)

    def of(op: Callable[..., torch.Tensor]) -> Callable[[], object]:
        if not train:
            return torch.no_grad()(lambda: op(y, x, change, rows))

        def whole() -> None:
            # Detached, so that the next step does not go through this one.
            torch.autograd.backward(op(y.detach(), x, change, rows), push)
            x.grad = change.grad = None

        return whole

    sides = {"ours": of(region_update_), "eager": of(_eager)}
    if device.type == "cuda":
        sides["compile"] = of(compiled(_eager))
    size, wide = y.element_size(), change.element_size()
    moved = 2 * tokens * neurons * size + tokens * inputs * size + neurons * inputs * wide
    # Backward: the columns' gradient and x are read, their gradients written.
    back = tokens * neurons * size + 2 * tokens * inputs * size + 2 * neurons * inputs * wide
    return Case(
        "region_update",
        f"{tokens} x {inputs} -> {neurons} of {outputs}, change in {str(of_change).removeprefix('torch.')}, "
        f"{'step' if train else 'forward'}",
        dtype,
        sides,
        moved + (back if train else 0),
        2 * tokens * neurons * inputs * (3 if train else 1),
    )
