"""What kernels of several ops do with tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from graftwork_kernels.dispatch import INTERPRETED

# The interpreter multiplies 16-bit operands wrongly; fp32 holds their products.
_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """Return acc + a b (fp32); fp32 operands are multiplied as such, never as TF32."""
    if _UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")
