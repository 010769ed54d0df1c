"""A linear layer with a gated low-rank branch: ours, eager PyTorch, PEFT's LoRA, and the layer alone.

The floor is that of the layer's own matrix product and its branch. PEFT's LoRA has no gate; it is what gating may cost.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable

import torch
from graftwork_kernels.gated_low_rank import gated_low_rank, gated_low_rank_reference
from harness import Case, compiled
from torch import nn
from torch.nn import functional as F


def cases(device: torch.device, *, quick: bool) -> Iterable[Case]:
    """Yield the forward and the training step of one layer, per shape and dtype."""
    large = device.type == "cuda" and not quick
    shapes = [(8, 1024, 4096, 4096), (8, 1024, 4096, 11008)] if large else [(4, 128, 576, 1536)]
    ranks = (10, 64) if large else (10,)
    for dtype in (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,):
        for shape in shapes:
            for rank in ranks:
                yield _case(device, dtype, shape, rank, False, quick)
                yield _case(device, dtype, shape, rank, True, quick)


def _case(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    rank: int,
    train: bool,
    quick: bool,
) -> Case:
    batch, tokens, inputs, outputs = shape
    layer = nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(batch, tokens, inputs, device=device, dtype=dtype, requires_grad=train)
    a = (torch.randn(rank, inputs, device=device, dtype=dtype) / inputs**0.5).requires_grad_(train)
    b = torch.randn(outputs, rank, device=device, dtype=dtype).requires_grad_(train)
    gate = (2 * torch.rand(batch, rank, device=device)).requires_grad_(train)
    push = torch.randn(batch, tokens, outputs, device=device, dtype=dtype)

    def step(call: Callable[[], torch.Tensor]) -> Callable[[], object]:
        if not train:
            return torch.no_grad()(call)

        def whole() -> None:
            torch.autograd.backward(call(), push)
            for tensor in (x, a, b, gate):
                tensor.grad = None

        return whole

    def of(op: Callable[..., torch.Tensor]) -> Callable[[], torch.Tensor]:
        return lambda: op(layer(x), x, a, b, gate, 0.5)

    sides = {
        "ours": step(of(gated_low_rank)),
        "eager": step(of(gated_low_rank_reference)),
        "layer alone": torch.no_grad()(lambda: F.linear(x, layer.weight)),
    }
    if device.type == "cuda":
        whole = compiled(lambda x, a, b, gate: gated_low_rank_reference(layer(x), x, a, b, gate, 0.5))
        sides["compile"] = step(lambda: whole(x, a, b, gate))
    missing = {}
    if importlib.util.find_spec("peft") is None:
        missing["PEFT LoRA, no gate"] = "peft is not installed"
    else:
        sides["PEFT LoRA, no gate"] = step(_lora(layer, rank, x, train))
    whole_tokens, size = batch * tokens, push.element_size()
    # Forward: the layer and two thin products; the step adds the layer's product for x and four thin ones.
    thin = 2 * whole_tokens * rank * (inputs + outputs)
    dense = 2 * whole_tokens * inputs * outputs
    return Case(
        "gated_low_rank",
        f"{whole_tokens} x {inputs} -> {outputs}, rank {rank}, {'step' if train else 'forward'}",
        dtype,
        sides,
        size * (whole_tokens * (inputs + outputs) + inputs * outputs) * (2 if train else 1),
        2 * dense + 3 * thin if train else dense + thin,
        missing,
    )


def _lora(layer: nn.Linear, rank: int, x: torch.Tensor, train: bool) -> Callable[[], torch.Tensor]:
    from peft.tuners.lora.config import LoraConfig
    from peft.tuners.lora.layer import Linear

    config = LoraConfig(r=rank, lora_alpha=rank)
    lora = Linear(layer, "default", config, r=rank, lora_alpha=rank)
    lora.to(x.device, x.dtype)
    for name, parameter in lora.named_parameters():
        parameter.requires_grad_(train and "lora_" in name)
    return lambda: lora(x)
