"""Cases of ``scaled_quantize``: codes of a token, packed, and the round trip with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from graftwork_kernels.scaled_quantize import (
    Rounding,
    fake_scaled_quantize,
    pack,
    scaled_quantize,
    turned,
)
from harness import Case, compiled

OP = "scaled_quantize"
# Hadamard kernels elsewhere turn, and others round; the libraries named have no call that does both.
MISSING = {
    "bitsandbytes": "rounds to floats of its own or to 8 bits by rows, not to these codes",
    "compressed-tensors": "its quantize is the eager side without diagonal and rotation",
}


def written_out(
    x: torch.Tensor, rounding: Rounding, diagonal: torch.Tensor, *, block: int, packed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return packed codes, scales and zero points as one would write it: an operation at a time."""
    y = turned(x, diagonal, block, None)
    high, low = y.amax(-1, keepdim=True).clamp(min=0), y.amin(-1, keepdim=True).clamp(max=0)
    scale = ((high - low) / rounding.divisor).clamp(min=rounding.floor)
    least, most = rounding.levels
    zero = (least - low / scale).clamp(least, most).round()
    codes = (y / scale + zero).clamp(least, most).round().to(torch.int8)
    return pack(codes, rounding.bits), scale, zero.to(torch.int8)


def round_trip_written_out(x: torch.Tensor, rounding: Rounding, diagonal: torch.Tensor) -> torch.Tensor:
    """Return the rounded values as one would write it, with straight-through rounding."""

    def straight(x: torch.Tensor) -> torch.Tensor:
        return x + (x.round() - x).detach()

    y = turned(x, diagonal, 1, None)
    high, low = y.amax(-1, keepdim=True).clamp(min=0), y.amin(-1, keepdim=True).clamp(max=0)
    scale = ((high - low) / rounding.divisor).clamp(min=rounding.floor)
    least, most = rounding.levels
    zero = straight((least - low / scale).clamp(least, most))
    return ((straight((y / scale + zero).clamp(least, most)) - zero) * scale).to(x.dtype)


def cases(device: torch.device, *, quick: bool) -> Iterable[Case]:
    """Yield the cases: tokens x width, with the Hadamard block of the width."""
    cuda = device.type == "cuda"
    shapes = [(64, 128)] if quick else [(16384, 4096), (8192, 8192)] if cuda else [(2048, 512), (512, 2048)]
    for tokens, width in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(tokens, width, device=device).to(dtype)
            diagonal = torch.rand(width, device=device) + 0.5
            size = x.element_size()
            for block in (1, width):
                rounding = Rounding(4, symmetric=False)
                name = f"{tokens}x{width}" + (f" hadamard {block}" if block > 1 else "")

                def codes(
                    call: Callable[..., object], x: torch.Tensor = x, diagonal: torch.Tensor = diagonal,
                    block: int = block, rounding: Rounding = rounding,
                ) -> Callable[[], object]:  # fmt: skip
                    return lambda: call(x, rounding, diagonal, block=block, packed=True)

                sides = {"ours": codes(scaled_quantize), "eager": codes(written_out)}
                if cuda:
                    sides["compile"] = codes(compiled(written_out))
                # Read once, write half a byte a value and five bytes a token.
                least = x.numel() * (size + 0.5) + 5 * tokens
                yield Case(OP, f"codes {name}", dtype, sides, least, missing=MISSING)
            leaf = x.clone().requires_grad_()
            grad = torch.randn_like(x)

            def trip(
                call: Callable[..., torch.Tensor], leaf: torch.Tensor = leaf, grad: torch.Tensor = grad,
                diagonal: torch.Tensor = diagonal,
            ) -> Callable[[], object]:  # fmt: skip
                rounding = Rounding(4, symmetric=False)
                return lambda: torch.autograd.grad(call(leaf, rounding, diagonal), leaf, grad)

            sides = {"ours": trip(fake_scaled_quantize), "eager": trip(round_trip_written_out)}
            if cuda:
                sides["compile"] = trip(compiled(round_trip_written_out))
            # Forward reads and writes a value, backward reads two and writes one.
            yield Case(OP, f"round trip {tokens}x{width}", dtype, sides, 5 * size * x.numel())
