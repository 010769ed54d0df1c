"""Scale, turn by Hadamard blocks and round, in one pass over the input.

With x (..., d), a diagonal ``s`` (d) and a Hadamard matrix ``H`` per block of d, ``y = (x * s) blockdiag(H)``. Each
row of y, or each ``group`` values of it, has a scale and, where levels are asymmetric, a zero point::

    hi = ratio * high * max(max y, 0)      lo = ratio * low * min(min y, 0)
    symmetric:   scale = max(hi, -lo) / (2^(b-1) - 1)         (half_range: / ((2^b - 1) / 2))
    asymmetric:  scale = (hi - lo) / (2^b - 1)                zero = round(clamp(-2^(b-1) - lo / scale))
    q = round(clamp(y / scale + zero, -2^(b-1), 2^(b-1) - 1))       y^ = (q - zero) scale

Rounding is half to even; scales are at least ``floor``. The equations are the usual ones (GPTQ, compressed-tensors).
:func:`scaled_quantize` returns ``q``; :func:`fake_scaled_quantize` returns ``y^`` with straight-through gradients:
``round`` counts as the identity, everything else as it is, so gradients reach the range, too.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graftwork_kernels.dispatch import HAS_TRITON, fused

if HAS_TRITON:
    from graftwork_kernels import scaled_quantize_op  # noqa: F401  registers the operators
    from graftwork_kernels.scaled_quantize_triton import plan
else:
    plan = None

PACKED_BITS = (2, 4, 8)
_CHUNK = 64


@dataclass(frozen=True)
class Rounding:
    """How y is rounded.

    Attributes:
        bits: 2 to 8.
        group: values that share a scale; None: a whole row.
        symmetric: without zero points.
        half_range: symmetric scales divide by ``(2^b - 1) / 2``, so that the largest value lies half a level above
            the last (compressed-tensors).
        ratio: share of each range that is kept.
        floor: least scale.
    """

    bits: int
    group: int | None = None
    symmetric: bool = True
    half_range: bool = False
    ratio: float = 1.0
    floor: float = 1e-8

    @property
    def levels(self) -> tuple[int, int]:
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    @property
    def divisor(self) -> float:
        steps = 2**self.bits - 1
        if not self.symmetric:
            return steps
        return steps / 2 if self.half_range else self.levels[1]


class Rounded(NamedTuple):
    """Codes (..., d) int8, or packed (..., words) int32; scales (..., groups) float32; zero points int8 or None.

    In float64 scales are float64. Where a slice is not finite, neither is its scale, and its codes mean nothing.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def scaled_quantize(
    x: Tensor,
    rounding: Rounding,
    diagonal: Tensor | None = None,
    *,
    block: int = 1,
    core: Tensor | None = None,
    packed: bool = False,
) -> Rounded:
    """Return the codes of ``(x * diagonal) blockdiag(H)``, in float32 or wider; see the module.

    Args:
        x: (..., d), any floating dtype.
        rounding: how.
        diagonal: (d), with random signs multiplied in where they are wanted.
        block: order of H: a power of two, or that times the order of ``core``; 1 turns nothing.
        core: (k, k) of 1 and -1, with orthogonal rows, for orders that are no power of two: H is
            ``core (x) Sylvester``.
        packed: codes come as compressed-tensors packs them: value ``i`` of a row, plus ``2^(b-1)``, in the bits
            ``i b`` and on of the row's words; 2, 4 or 8 bits.

    Raises:
        ValueError: sizes that do not fit, or bits that are not packed.
    """
    _check(x, rounding, diagonal, block, core)
    if packed and rounding.bits not in PACKED_BITS:
        raise ValueError(f"{rounding.bits} bits are not packed here; 2, 4 and 8 are")
    if not _in_kernel(x, rounding, block, core):
        return scaled_quantize_reference(x, rounding, diagonal, block=block, core=core, packed=packed)
    codes, scale, zero = torch.ops.graftwork.scaled_quantize(
        x, diagonal, _like(core), rounding.bits, block, rounding.group, rounding.symmetric, rounding.half_range,
        rounding.ratio, rounding.floor, packed,
    )  # fmt: skip
    return Rounded(codes, scale, None if rounding.symmetric else zero)


def fake_scaled_quantize(
    x: Tensor,
    rounding: Rounding,
    diagonal: Tensor | None = None,
    *,
    block: int = 1,
    core: Tensor | None = None,
    high: Tensor | None = None,
    low: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``y^`` (..., d) of the module, with straight-through gradients to x, diagonal, high and low.

    Args:
        x, rounding, diagonal, block, core: as in :func:`scaled_quantize`.
        high, low: shares of the largest and the least value that are kept; both, each of one number or (..., groups).
        dtype: of the result; that of ``x`` where None. Arithmetic is in float32, in float64 for float64.

    Raises:
        ValueError: sizes that do not fit.
    """
    _check(x, rounding, diagonal, block, core)
    if (high is None) != (low is None):
        raise ValueError("the shares high and low are given together or not at all")
    dtype = dtype or x.dtype
    if not _in_kernel(x, rounding, block, core):
        return _fake(x, rounding, diagonal, block, core, high, low).to(dtype)
    if high is not None and low is not None:
        slices = (*x.shape[:-1], x.shape[-1] // (rounding.group or x.shape[-1]))
        if high.numel() > 1 or low.numel() > 1:
            high, low = (share.float().expand(slices).contiguous() for share in (high, low))
        else:
            high, low = high.float(), low.float()
    return torch.ops.graftwork.scaled_fake_quantize(
        x, diagonal, _like(core), high, low, rounding.bits, block, rounding.group, rounding.symmetric,
        rounding.half_range, rounding.ratio, rounding.floor, dtype,
    )  # fmt: skip


# ---------------------------------------------------------------------- in PyTorch


def scaled_quantize_reference(
    x: Tensor, rounding: Rounding, diagonal: Tensor | None = None, *, block: int = 1, core: Tensor | None = None,
    packed: bool = False,
) -> Rounded:  # fmt: skip
    """Return what :func:`scaled_quantize` returns, in plain PyTorch; the definition where x is float64."""
    with torch.no_grad():
        y = _grouped(turned(x, diagonal, block, core), rounding)
        scale, zero = _scales(y, rounding, None, None)
        codes = (y / scale if zero is None else (y / scale).add_(zero)).clamp_(*rounding.levels).round_()
        # A cast of NaN is any number, on every machine another.
        codes = codes.nan_to_num_(0.0).to(torch.int8).reshape(x.shape)
        return Rounded(
            pack(codes, rounding.bits) if packed else codes,
            scale.squeeze(-1),
            None if zero is None else zero.squeeze(-1).to(torch.int8),
        )


def fake_scaled_quantize_reference(
    x: Tensor, rounding: Rounding, diagonal: Tensor | None = None, *, block: int = 1, core: Tensor | None = None,
    high: Tensor | None = None, low: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return what :func:`fake_scaled_quantize` returns, in plain PyTorch; the definition where x is float64."""
    return _fake(x, rounding, diagonal, block, core, high, low).to(x.dtype)


def turned(x: Tensor, diagonal: Tensor | None, block: int, core: Tensor | None) -> Tensor:
    """Return ``(x * diagonal) blockdiag(H)`` in float32, or in float64 where x is."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if diagonal is not None:
        y = y * diagonal.to(y.dtype)
    if block == 1:
        return y
    order = 1 if core is None else core.shape[0]
    power = block // order
    shape, width = y.shape, power
    # Autocast would multiply in half precision, where nothing is orthogonal.
    with torch.autocast(x.device.type, enabled=False):
        while width > 1:
            # Each factor of a Sylvester matrix acts on some digits of the index; a small product beats many passes.
            size = min(width, _CHUNK)
            width //= size
            factor = _sylvester(size, y)
            y = y.reshape(-1, size, power // (width * size)) if width * size < power else y.reshape(-1, size)
            y = torch.matmul(factor, y) if y.ndim == 3 else y @ factor
        if core is not None:
            y = torch.matmul(core.to(y).t(), y.reshape(-1, order, power))
    return (y * (1 / math.sqrt(block))).reshape(shape)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes (..., d; int8) as words (..., ceil(d b / 32); int32), in compressed-tensors' order."""
    # Bytes are filled, then read as words; what fills up the last word is zero after the shift of the codes.
    values = codes.contiguous().view(torch.uint8) + (1 << (bits - 1))
    values = torch.nn.functional.pad(values, (0, -codes.shape[-1] % (32 // bits)))
    parts = values.unflatten(-1, (-1, 8 // bits)).unbind(-1)
    filled = parts[0]
    for number, part in enumerate(parts[1:], 1):
        filled = filled | (part << (number * bits))
    if sys.byteorder == "big" and not codes.is_cuda:
        filled = filled.unflatten(-1, (-1, 4)).flip(-1).flatten(-2)
    if not filled.numel():
        # An empty tensor may keep strides that a view of words does not like.
        return filled.new_empty((*filled.shape[:-1], filled.shape[-1] // 4), dtype=torch.int32)
    return filled.contiguous().view(torch.int32)


class _Straight(torch.autograd.Function):
    """Round half to even; gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing was done (straight-through)."""
    return _Straight.apply(x)  # pyright: ignore[reportReturnType]


def _fake(
    x: Tensor, rounding: Rounding, diagonal: Tensor | None, block: int, core: Tensor | None, high: Tensor | None,
    low: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return ``y^`` in float32 or wider; without gradients in as few passes and as little memory as can be."""
    y = _grouped(turned(x, diagonal, block, core), rounding)
    scale, zero = _scales(y, rounding, high, low)
    least, most = rounding.levels
    if torch.is_grad_enabled() and (y.requires_grad or scale.requires_grad):
        u = y / scale if zero is None else y / scale + zero
        codes = round_ste(u.clamp(least, most))
        return ((codes if zero is None else codes - zero) * scale).reshape(x.shape)
    codes = y / scale
    if zero is not None:
        codes.add_(zero)
    codes.clamp_(least, most).round_()
    if zero is not None:
        codes.sub_(zero)
    return codes.mul_(scale).reshape(x.shape)


def _scales(
    y: Tensor, rounding: Rounding, high: Tensor | None, low: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return scales and zero points (..., groups, 1) of grouped values, in their dtype."""
    hi, lo = y.amax(-1, keepdim=True).clamp(min=0), y.amin(-1, keepdim=True).clamp(max=0)
    if high is not None and low is not None:
        hi, lo = (
            end * (share.to(end.dtype).unsqueeze(-1) if share.ndim else share.to(end.dtype))
            for end, share in ((hi, high), (lo, low))
        )
    if rounding.ratio != 1:
        hi, lo = hi * rounding.ratio, lo * rounding.ratio
    width = torch.maximum(hi, -lo) if rounding.symmetric else hi - lo
    # A GPU divides by a number of the host through its reciprocal, which is another result.
    scale = (width / torch.full_like(width, rounding.divisor)).clamp(min=rounding.floor)
    if rounding.symmetric:
        return scale, None
    least, most = rounding.levels
    return scale, round_ste((least - lo / scale).clamp(least, most))


def _grouped(y: Tensor, rounding: Rounding) -> Tensor:
    return y.unflatten(-1, (-1, rounding.group)) if rounding.group else y.unsqueeze(-2)


def _sylvester(size: int, like: Tensor) -> Tensor:
    """Return Sylvester's matrix of a power of two, of 1 and -1."""
    matrix = like.new_ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


# ---------------------------------------------------------------------- which path


def _check(x: Tensor, rounding: Rounding, diagonal: Tensor | None, block: int, core: Tensor | None) -> None:
    d = x.shape[-1] if x.ndim else 0
    if not d:
        raise ValueError(f"rows of at least one value are rounded, not {tuple(x.shape)}")
    if not 2 <= rounding.bits <= 8:
        raise ValueError(f"codes have 2 to 8 bits, not {rounding.bits}")
    if rounding.group is not None and (rounding.group < 1 or d % rounding.group):
        raise ValueError(f"groups of {rounding.group} do not make up {d}")
    if diagonal is not None and tuple(diagonal.shape) != (d,):
        raise ValueError(f"a diagonal of {tuple(diagonal.shape)} for rows of {d}")
    order = 1 if core is None else core.shape[0]
    if core is not None and tuple(core.shape) != (order, order):
        raise ValueError(f"a core is square, not {tuple(core.shape)}")
    power, rest = divmod(block, order) if block > 0 else (0, 0)
    if rest or power < 1 or power & (power - 1) or d % block:
        raise ValueError(
            f"blocks of {block} do not make up {d}, or are no power of two times the core's {order}"
        )


def _in_kernel(x: Tensor, rounding: Rounding, block: int, core: Tensor | None) -> bool:
    if plan is None or x.dtype == torch.float64 or not x.numel() or not fused(x):
        return False
    order = 1 if core is None else core.shape[0]
    d, group = x.shape[-1], rounding.group
    return plan(d, block, order, None if group == d else group) is not None


def _like(core: Tensor | None) -> Tensor | None:
    return None if core is None else core.float().contiguous()
