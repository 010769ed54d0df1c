"""Cases of ``packed_matmul``: decoding (one row) and prefill (many), with and without diagonals and correction."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable

import torch
from graftwork_kernels.packed_matmul import packed_matmul, packed_matmul_reference
from graftwork_kernels.scaled_quantize import pack
from harness import Case, compiled

OP = "packed_matmul"
PACKING = "compressed_tensors.compressors.pack_quantized.helpers"


def cases(device: torch.device, *, quick: bool) -> Iterable[Case]:
    """Yield the cases: rows of x, width of a square weight, bits."""
    cuda = device.type == "cuda"
    wide = 128 if quick else 4096 if cuda else 1024
    for rows in (1, 8) if quick else (1, 16, 2048) if cuda else (1, 128):
        for bits in (4, 2):
            for rank in (0, 32):
                for dtype in (torch.bfloat16,) if cuda else (torch.float32,):
                    yield _case(device, rows, wide, bits, rank, dtype, cuda)


def _case(
    device: torch.device, rows: int, wide: int, bits: int, rank: int, dtype: torch.dtype, cuda: bool
) -> Case:
    group, least = 128, -(2 ** (bits - 1))
    codes = torch.randint(least, -least, (wide, wide), dtype=torch.int8, device=device)
    packed = pack(codes, bits)
    scale = (torch.rand(wide, wide // group, device=device) * 0.02).to(dtype)
    x = torch.randn(rows, wide, device=device).to(dtype)
    extras: dict[str, object] = {}
    if rank:
        into, out = (torch.rand(wide, device=device).to(dtype) for _ in range(2))
        left, right = torch.randn(wide, rank, device=device), torch.randn(rank, wide, device=device)
        extras = {"into": into, "out": out, "correction": (left.to(dtype), right.to(dtype))}
    dense = ((codes.unflatten(1, (-1, group)) * scale.unsqueeze(-1)).flatten(1)).to(dtype)

    def ours(call: Callable[..., object]) -> Callable[[], object]:
        return lambda: call(x, packed, scale, bits=bits, **extras)

    sides = {"ours": ours(packed_matmul), "eager": ours(packed_matmul_reference)}
    if cuda:
        sides["compile"] = ours(compiled(packed_matmul_reference))
    missing: dict[str, str] = {}
    if rank:
        missing["compressed-tensors, bitsandbytes"] = "have no product with diagonals and a correction"
    else:
        sides["dense weight"] = lambda: torch.nn.functional.linear(x, dense)
        _rivals(sides, missing, x, packed, scale, dense, bits)
    size = x.element_size()
    least_bytes = packed.numel() * 4 + scale.numel() * size + 2 * x.numel() * size + 2 * rank * wide * size
    name = f"{rows} x {wide} W{bits}g{group}" + (f" diagonals rank {rank}" if rank else "")
    flops = 2.0 * rows * wide * (wide + 2 * rank)
    return Case(OP, name, dtype, sides, least_bytes, flops, missing)


def _rivals(
    sides: dict[str, Callable[[], object]], missing: dict[str, str], x: torch.Tensor, packed: torch.Tensor,
    scale: torch.Tensor, dense: torch.Tensor, bits: int,
) -> None:  # fmt: skip
    """Add what is installed: compressed-tensors' unpacking and a product, bitsandbytes' four-bit product."""
    if importlib.util.find_spec("compressed_tensors") is None:
        missing["compressed-tensors"] = "not installed"
    else:
        unpack = importlib.import_module(PACKING).unpack_from_int32
        groups = scale.shape[1]

        def decompress() -> object:
            codes = unpack(packed, bits, dense.shape).to(x.dtype).unflatten(1, (groups, -1))
            return torch.nn.functional.linear(x, (codes * scale.unsqueeze(-1)).flatten(1))

        sides["compressed-tensors"] = decompress
    if importlib.util.find_spec("bitsandbytes") is None:
        missing["bitsandbytes"] = "not installed"
    elif bits == 4:
        library = importlib.import_module("bitsandbytes")
        words, state = library.functional.quantize_4bit(dense, blocksize=128, quant_type="fp4")
        sides["bitsandbytes fp4"] = lambda: library.matmul_4bit(x, words.t(), quant_state=state)
    else:
        missing["bitsandbytes"] = "has no two bits"
