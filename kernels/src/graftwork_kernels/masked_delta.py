"""A merge under a bit mask: base + mask * vector, with one bit per weight.

Packed masks are those of Graftwork's artefacts ("bitmask/1"): a mask of R x C becomes int32 words, R x ceil(C / 32);
column c is bit ``c % 32`` of word ``c // 32``, counted from the least significant one; bits behind the last column
are 0 when written and ignored when read.

Legend: R rows, C columns, W = ceil(C / 32) words a row.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch.nn.functional import pad

from graftwork_kernels.dispatch import fused

WORD = 32
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CHUNK = 1 << 16
"""Entries that the PyTorch paths compute together."""
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
# Eight bools are the bytes of one integer; by this factor their bits meet in its highest byte, the first bool lowest.
_GATHER = 0x0102040810204080


def words_of(columns: int) -> int:
    """Return how many words hold a row of ``columns`` bits."""
    return -(-columns // WORD)


# ------------------------------------------------------------ packing


def pack_mask_reference(mask_RC: torch.Tensor) -> torch.Tensor:
    """Pack bit by bit; the definition. See :func:`pack_mask`."""
    rows, columns = mask_RC.shape
    padded = pad(mask_RC.long(), (0, words_of(columns) * WORD - columns))
    bits_RWB = padded.view(rows, words_of(columns), WORD)
    return (bits_RWB << torch.arange(WORD, device=mask_RC.device)).sum(-1).to(torch.int32)


def unpack_mask_reference(words_RW: torch.Tensor, columns: int) -> torch.Tensor:
    """Unpack bit by bit; the definition. See :func:`unpack_mask`."""
    places_B = torch.arange(WORD, dtype=torch.int32, device=words_RW.device)
    return ((words_RW.unsqueeze(-1) >> places_B) & 1).bool().flatten(1)[:, :columns]


def pack_mask(mask_RC: torch.Tensor) -> torch.Tensor:
    """Return a bool mask (R x C) as int32 words (R x W).

    Raises:
        ValueError: no bool matrix.
    """
    if mask_RC.dtype != torch.bool or mask_RC.ndim != 2:
        raise ValueError(f"a mask is a bool matrix, not {mask_RC.dtype} of shape {tuple(mask_RC.shape)}")
    return _pack(mask_RC)


def unpack_mask(words_RW: torch.Tensor, columns: int) -> torch.Tensor:
    """Return int32 words (R x W) as a bool mask (R x columns).

    Raises:
        ValueError: words of another dtype, or too many or too few for so many columns.
    """
    check_words(words_RW, columns)
    return _unpack(words_RW, columns)


def check_words(words: torch.Tensor, columns: int) -> None:
    """Refuse what is no packed mask (R x W) of so many columns.

    Raises:
        ValueError: see there.
    """
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] != words_of(columns):
        raise ValueError(
            f"a mask of {columns} columns has {words_of(columns)} int32 words a row, not {tuple(words.shape)} of "
            f"{words.dtype}"
        )


@torch.library.custom_op("graftwork::pack_mask", mutates_args=())
def _pack(mask_RC: torch.Tensor) -> torch.Tensor:
    columns = mask_RC.shape[1]
    if fused(mask_RC):
        from graftwork_kernels.masked_delta_triton import pack

        return pack(mask_RC.contiguous())
    if sys.byteorder == "big" or not mask_RC.numel():
        return pack_mask_reference(mask_RC)
    padded = pad(mask_RC, (0, words_of(columns) * WORD - columns)).contiguous()
    octets = (padded.view(torch.int64) * _GATHER) >> 56
    return octets.to(torch.uint8).view(torch.int32)


@_pack.register_fake
def _(mask_RC: torch.Tensor) -> torch.Tensor:
    rows, columns = mask_RC.shape
    return mask_RC.new_empty(rows, words_of(columns), dtype=torch.int32)


@torch.library.custom_op("graftwork::unpack_mask", mutates_args=())
def _unpack(words_RW: torch.Tensor, columns: int) -> torch.Tensor:
    if fused(words_RW):
        from graftwork_kernels.masked_delta_triton import unpack

        return unpack(words_RW.contiguous(), columns)
    return _bits(words_RW, columns).contiguous()


@_unpack.register_fake
def _(words_RW: torch.Tensor, columns: int) -> torch.Tensor:
    return words_RW.new_empty(words_RW.shape[0], columns, dtype=torch.bool)


def _bits(words_RW: torch.Tensor, columns: int) -> torch.Tensor:
    """Unpack by a table: a byte of bits is eight bytes of bools, which are one integer."""
    if sys.byteorder == "big" or not words_RW.numel():
        return unpack_mask_reference(words_RW, columns)
    octets = words_RW.contiguous().view(torch.uint8)
    table_B = _table(words_RW.device)
    return table_B.index_select(0, octets.flatten().int()).view(torch.bool).view(len(octets), -1)[:, :columns]


@functools.cache
def _table(device: torch.device) -> torch.Tensor:
    """Return the bools of every byte, as one integer each."""
    bits_BP = (torch.arange(256).unsqueeze(-1) >> torch.arange(8)) & 1
    return bits_BP.to(torch.uint8).view(torch.int64).flatten().to(device)


# ------------------------------------------------------------ base + mask * vector


def masked_delta_reference(
    base_RC: torch.Tensor, delta_RC: torch.Tensor, words_RW: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """Add where a bit is set; the definition. See :func:`masked_delta`."""
    exact = torch.float64 if base_RC.dtype == torch.float64 else torch.float32
    mask_RC = unpack_mask_reference(words_RW, base_RC.shape[1])
    added_RC = torch.where(mask_RC, delta_RC.to(exact) * scale, 0.0)
    return (base_RC.to(exact) + added_RC).to(base_RC.dtype)


def masked_delta(
    base_RC: torch.Tensor, delta_RC: torch.Tensor, words_RW: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """Return ``base + scale * mask * delta``, formed in float32 and rounded once, to the base's dtype.

    Where nothing is added the base's own bytes stay, a negative zero among them. Differentiable in ``base`` and
    ``delta``. MMER's rebuilt expert, ``theta_0 + gamma_i m_i u`` (its spec, steps 2 and 3).

    Args:
        base_RC: R x C, float32, bfloat16 or float16 (float64: all in float64).
        delta_RC: R x C, of any of these dtypes.
        words_RW: the packed mask, see :func:`pack_mask`.
        scale: of what is added.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
    """
    check_operands(base_RC, delta_RC)
    check_words(words_RW, base_RC.shape[1])
    if words_RW.shape[0] != base_RC.shape[0]:
        raise ValueError(f"the mask has {words_RW.shape[0]} rows, and the base has {base_RC.shape[0]}")
    return _masked(base_RC, delta_RC, words_RW, scale)


def check_operands(base: torch.Tensor, delta: torch.Tensor) -> None:
    """Refuse two tensors that are no matrices of one shape and of float dtypes.

    Raises:
        ValueError: see there.
    """
    if base.ndim != 2 or base.shape != delta.shape:
        raise ValueError(
            f"base and difference are matrices of one shape, not {tuple(base.shape)} and {tuple(delta.shape)}"
        )
    if base.dtype not in FLOATS or delta.dtype not in FLOATS:
        raise ValueError(f"base and difference are floating point, not {base.dtype} and {delta.dtype}")


@torch.library.custom_op("graftwork::masked_delta", mutates_args=())
def _masked(
    base_RC: torch.Tensor, delta_RC: torch.Tensor, words_RW: torch.Tensor, scale: float
) -> torch.Tensor:
    if fused(base_RC, delta_RC, words_RW) and torch.float64 not in (base_RC.dtype, delta_RC.dtype):
        from graftwork_kernels.masked_delta_triton import add

        return add(base_RC.contiguous(), delta_RC.contiguous(), words_RW.contiguous(), scale)
    return plain(base_RC, delta_RC, words_RW, scale)


def plain(
    base_RC: torch.Tensor, delta_RC: torch.Tensor, words_RW: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return what :func:`masked_delta` does, by PyTorch.

    A few rows at a time, so that what is computed on the way stays in a cache.
    """
    rows, columns = base_RC.shape
    exact = torch.float64 if base_RC.dtype == torch.float64 else torch.float32
    step = max(1, CHUNK // max(1, columns))
    out = torch.empty_like(base_RC, memory_format=torch.contiguous_format)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        more = delta_RC[part].to(exact)
        if scale != 1:
            more = more * scale
        # What is added where nothing is, or where a zero is, is a negative zero: it leaves every number as it is.
        bits = more.view(INTEGERS[exact.itemsize])
        lowest = torch.iinfo(bits.dtype).min
        stays = spread(_bits(words_RW[part], columns), bits.dtype)
        stays &= (bits | -bits) >> (8 * exact.itemsize - 1)
        more = ((bits ^ lowest) & stays).bitwise_xor_(lowest).view(exact)
        # A sum of two dtypes is taken in the wider one, without a copy of the base in it.
        out[part] = more.add_(base_RC[part])
    return out


def spread(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return integers that are all ones where a bool mask is true: PyTorch chooses by bits faster than by bools."""
    return mask.view(torch.uint8).to(dtype).neg_()


@_masked.register_fake
def _(base_RC: torch.Tensor, delta_RC: torch.Tensor, words_RW: torch.Tensor, scale: float) -> torch.Tensor:
    return base_RC.new_empty(base_RC.shape)


def _save(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, float],
    output: torch.Tensor,
) -> None:
    base, delta, words, scale = inputs
    ctx.save_for_backward(words)
    ctx.scale, ctx.dtype, ctx.columns = scale, delta.dtype, base.shape[1]  # type: ignore[attr-defined]


def _backward(ctx: object, grad_RC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    (words_RW,) = ctx.saved_tensors  # type: ignore[attr-defined]
    needs = ctx.needs_input_grad  # type: ignore[attr-defined]
    of_delta = None
    if needs[1]:
        mask_RC = _unpack(words_RW, ctx.columns)  # type: ignore[attr-defined]
        of_delta = torch.where(mask_RC, grad_RC * ctx.scale, 0.0).to(ctx.dtype)  # type: ignore[attr-defined]
    return grad_RC if needs[0] else None, of_delta, None, None


_masked.register_autograd(_backward, setup_context=_save)
