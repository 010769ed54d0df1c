"""Run a compressed model on the integers it is stored in, instead of on numbers that these were turned to once.

The core's layer keeps the numbers that it has unpacked, which costs no time after the first call and four to eight
times the memory of the integers. On a GPU the packed product reads less and is what decoding wants; on a CPU it
unpacks at every call and saves memory only.
"""

from __future__ import annotations

import torch
from graftwork.transform.modules import CompressedLinear
from graftwork_kernels.packed_matmul import BITS, packed_matmul
from torch import nn
from torch.nn import functional


class PackedLinear(CompressedLinear):
    """A rounded linear that multiplies with its packed integers; it holds and stores what it did before.

    Gradients reach its input only. Outputs are those of the core's layer but for the order of summation.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.weights is not None
        assert self.weight_packed is not None
        assert self.weight_scale is not None
        seen = self.effective_input(x)
        # The correction sees the plain input: the product takes it in where that is what the weight sees.
        inside = seen is x
        parts = (self.weight_scale, *(self.correction or ()), *([] if self.bias is None else [self.bias]))
        scale, *rest = (part.detach() for part in parts)
        bias = None if self.bias is None else rest.pop()
        correction = (rest[0], rest[1]) if rest else None
        y = packed_matmul(
            seen,
            self.weight_packed,
            scale,
            self.weight_zero_point,
            bits=self.weights.bits,
            correction=correction if inside else None,
            bias=bias,
        )
        if correction is None or inside:
            return y
        return y + functional.linear(functional.linear(x, correction[1]), correction[0])


def run_packed(model: nn.Module) -> int:
    """Let every linear of ``model`` that is rounded to 2 or 4 bits run packed, and return how many do.

    The model is one that was loaded after ``import graftwork.transform.loading``, or holds such layers otherwise; it
    is changed in place, and its state dict stays as it is.
    """
    count = 0
    for module in model.modules():
        if (
            isinstance(module, CompressedLinear)
            and module.weights is not None
            and module.weights.bits in BITS
        ):
            module.forget()
            module.__class__ = PackedLinear
            count += 1
    return count
