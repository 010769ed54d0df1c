"""Numbers to integers and back: scales, codes, and the same with gradients.

The arithmetic is that of compressed-tensors: ``round(clamp(x / s + z))`` and ``(q - z) s``. Values come from codes in
the dtype of the scales, so what a checkpoint in that format gives back is what was rounded here, bit for bit. So are
scales where the convention is ``half-range`` or the levels are asymmetric, and rounded tokens. Only the codes of a
weight in half precision are found in float32, which that library does not do: in half precision, rounding what was
rounded changes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftwork.errors import UserError
from graftwork.transform.scheme import ActivationScheme, Convention, WeightScheme, check_group

TOKEN_FLOOR = 1e-8
"""The least scale of a token; less where half precision cannot say that."""

_CLIP_STEPS, _CLIP_NORM = 80, 2.4


@dataclass(frozen=True)
class Quantized:
    """A rounded weight, ``(q - z) s`` per row or per group of a row.

    Attributes:
        codes: out x in, int8, from ``-2^(b-1)`` to ``2^(b-1) - 1``.
        scale: out x groups, in the dtype of the weight.
        zero: out x groups, int8, in the range of the codes; None where levels are symmetric.
        scheme: how it was rounded.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: WeightScheme

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight (out x in) that the codes stand for, computed in the dtype of the scales."""
        grouped = self.codes.unflatten(1, (self.scale.shape[1], -1))
        return _values(grouped, self.scale, self.zero).flatten(1).to(dtype or self.scale.dtype)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if nothing was done (straight-through)."""
    return _Round.apply(x)  # pyright: ignore[reportReturnType]


def levels(bits: int) -> tuple[int, int]:
    """Return the least and the largest code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def weight_scales(weight: Tensor, scheme: WeightScheme, name: str = "") -> tuple[Tensor, Tensor | None]:
    """Return the scales (out x groups) and, where levels are asymmetric, the zero points (int8) of a weight.

    With ``clip="mse"`` every range is narrowed by the factor ``1 - i/100``, ``i`` from 0 to 79, that makes the sum of
    ``|x^ - x|^2.4`` least.

    Raises:
        UserError: the group size does not divide the row, or the weight holds NaN or infinity.
    """
    grouped = _checked(weight, scheme, name)
    share = _clip_share(grouped, scheme)
    scale, zero = _scales(grouped, scheme, share, share)
    return scale, None if zero is None else zero.to(torch.int8)


def quantize_with(weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: WeightScheme) -> Tensor:
    """Return the nearest codes (out x in, int8) of a weight for given scales and zero points."""
    grouped = weight.unflatten(1, (scale.shape[1], -1))
    return _codes(grouped, scale, zero, scheme.bits).to(torch.int8).flatten(1)


def quantize_weight(weight: Tensor, scheme: WeightScheme, name: str = "") -> Quantized:
    """Round a weight (out x in) to nearest.

    Raises:
        UserError: as :func:`weight_scales`; the sentence names ``name``.
        ValueError: the scheme rounds nothing.
    """
    scale, zero = weight_scales(weight.detach(), scheme, name)
    return Quantized(quantize_with(weight.detach(), scale, zero, scheme), scale, zero, scheme)


def fake_quantize_weight(
    weight: Tensor, scheme: WeightScheme, high: Tensor | None = None, low: Tensor | None = None
) -> Tensor:
    """Return the weight (out x in) that rounding would leave, with straight-through gradients.

    The values are those of :func:`quantize_weight`. Gradients reach the weight both through its codes and through its
    scales. ``high`` and ``low`` (out x groups, or what broadcasts to it) are the shares of the largest and the least
    value that are kept, in (0, 1); a symmetric range is the larger of both in size. They take the place of the
    scheme's ``clip``.
    """
    if not scheme.rounds:
        return weight
    grouped = _grouped(weight, scheme)
    if high is None and low is None:
        high = low = _clip_share(grouped.detach(), scheme)
    scale, zero = _scales(grouped, scheme, high, low)
    codes = _codes(grouped, scale, zero, scheme.bits)
    return _values(codes, scale, zero).flatten(1)


def fake_quantize_tokens(
    x: Tensor, scheme: ActivationScheme, high: Tensor | None = None, low: Tensor | None = None
) -> Tensor:
    """Return ``x`` (..., d) with every slice of the last axis rounded, with straight-through gradients.

    ``high`` and ``low`` (scalars, or what broadcasts to (..., 1)) are the shares of the largest and the least value
    that are kept; the scheme's ``ratio`` multiplies both. A scale is 1e-8 or more. The dtype stays.
    """
    if not scheme.rounds:
        return x
    highest, lowest = _range(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True), high, low)
    if scheme.ratio != 1:
        highest, lowest = highest * scheme.ratio, lowest * scheme.ratio
    kind = torch.finfo(x.dtype)
    floor = max(TOKEN_FLOOR, kind.tiny * kind.eps)
    if scheme.symmetric:
        scale = _symmetric_scale(highest, lowest, scheme.bits, scheme.convention).clamp(min=floor)
        zero = None
    else:
        scale = _asymmetric_scale(highest, lowest, scheme.bits).clamp(min=floor)
        zero = _zero(lowest, scale, scheme.bits)
    codes = _coded(x, scale, zero, scheme.bits)
    return (codes if zero is None else codes - zero) * scale


def _checked(weight: Tensor, scheme: WeightScheme, name: str) -> Tensor:
    if not scheme.rounds:
        raise ValueError(f"a scheme of {scheme.bits} bits rounds nothing")
    check_group(scheme, weight.shape[1], name)
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise UserError(
            f"the weight '{name}' holds {bad} values that are no numbers (NaN or infinity) and cannot be rounded; "
            f"look at what made it"
        )
    return _grouped(weight, scheme)


def _grouped(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """Return the weight as out x groups x values that share a scale."""
    return weight.unflatten(1, (-1, scheme.group or weight.shape[1]))


def _clip_share(grouped: Tensor, scheme: WeightScheme) -> Tensor | None:
    """Return the share of each range (out x groups) whose rounding error is least, or None for all of it."""
    if scheme.clip == "none":
        return None
    best = torch.full_like(grouped[..., 0], torch.inf, dtype=torch.float32)
    share = torch.ones_like(grouped[..., 0])
    for step in range(_CLIP_STEPS):
        kept = torch.full_like(share, 1 - step / 100)
        scale, zero = _scales(grouped, scheme, kept, kept)
        wrong = _values(_codes(grouped, scale, zero, scheme.bits), scale, zero) - grouped
        error = wrong.float().abs().pow_(_CLIP_NORM).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        share = torch.where(better, kept, share)
    return share


def _scales(
    grouped: Tensor, scheme: WeightScheme, high: Tensor | None, low: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return scales and zero points (out x groups, dtype of the weight) of a grouped weight."""
    highest, lowest = _range(grouped.amax(-1), grouped.amin(-1), high, low)
    if scheme.symmetric:
        scale = _symmetric_scale(highest, lowest, scheme.bits, scheme.convention)
        return _some(scale), None
    # Where there are only zeros the range is -1 to 1, so that zero is a level.
    empty = highest == lowest
    highest = torch.where(empty, torch.ones_like(highest), highest)
    lowest = torch.where(empty, -torch.ones_like(lowest), lowest)
    scale = _some(_asymmetric_scale(highest, lowest, scheme.bits))
    return scale, _zero(lowest, scale, scheme.bits)


def _range(highest: Tensor, lowest: Tensor, high: Tensor | None, low: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the range that is to be covered; zero is always in it."""
    highest, lowest = highest.clamp(min=0), lowest.clamp(max=0)
    return (
        highest if high is None else highest * high.to(highest.dtype),
        lowest if low is None else lowest * low.to(lowest.dtype),
    )


def _symmetric_scale(highest: Tensor, lowest: Tensor, bits: int, convention: Convention) -> Tensor:
    largest = torch.maximum(highest, -lowest)
    return largest / _on(largest, 2 ** (bits - 1) - 1 if convention == "largest-level" else (2**bits - 1) / 2)


def _asymmetric_scale(highest: Tensor, lowest: Tensor, bits: int) -> Tensor:
    return (highest - lowest) / _on(highest, 2**bits - 1)


def _zero(lowest: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the zero points, integers in the dtype of the scale."""
    least, largest = levels(bits)
    return round_ste((least - lowest / scale).clamp(least, largest))


def _some(scale: Tensor) -> Tensor:
    """Return scales without zeros, which would divide zero by zero."""
    return torch.where(scale == 0, torch.full_like(scale, torch.finfo(scale.dtype).eps), scale)


def _on(like: Tensor, value: float) -> Tensor:
    # A device divides by a number of the host through its reciprocal, which is another result.
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def _codes(grouped: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Return the codes of a grouped weight as numbers, of float32 or wider."""
    wide = torch.promote_types(grouped.dtype, torch.float32)
    return _coded(
        grouped.to(wide), scale.to(wide).unsqueeze(-1), None if zero is None else zero.unsqueeze(-1), bits
    )


def _coded(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Return codes as numbers of the dtype of ``x``; ``scale`` and ``zero`` broadcast."""
    scaled = x / scale
    if zero is not None:
        scaled = scaled + zero.to(x.dtype)
    return round_ste(scaled.clamp(*levels(bits)))


def _values(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Return ``(q - z) s`` for codes that are out x groups x values."""
    numbers = codes.to(scale.dtype)
    if zero is not None:
        numbers = numbers - zero.to(scale.dtype).unsqueeze(-1)
    return numbers * scale.unsqueeze(-1)
