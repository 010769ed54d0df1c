"""Bits in words, and a base with what a mask keeps of a difference: kernel, PyTorch path and definition are one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from graftwork_kernels.dispatch import INTERPRETED, interpreting
from graftwork_kernels.masked_delta import (
    masked_delta,
    masked_delta_reference,
    pack_mask,
    pack_mask_reference,
    unpack_mask,
    unpack_mask_reference,
)
from graftwork_kernels.testing import BOUNDS, assert_within

Path = Callable[[], contextlib.AbstractContextManager[None]]
SHAPES = [(1, 1), (3, 31), (2, 32), (5, 33), (7, 100), (70, 65), (0, 5), (4, 0), (1, 3000)]


@pytest.fixture(params=["pytorch", "kernel"])
def path(request: pytest.FixtureRequest) -> Path:
    """Both paths; on a GPU the kernel only, as the PyTorch path is not taken there."""
    if request.param == "kernel":
        return interpreting if INTERPRETED else contextlib.nullcontext
    if not INTERPRETED and torch.cuda.is_available():
        pytest.skip("a GPU takes the kernel")
    return contextlib.nullcontext


def drawn(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    source = torch.Generator().manual_seed(rows * 1000 + columns)
    base, delta = torch.randn(2, rows, columns, generator=source)
    mask = torch.rand(rows, columns, generator=source) < 0.4
    return base.to(device, dtype), (delta / 8).to(device, dtype), mask.to(device)


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_and_back(shape: tuple[int, int], path: Path, device: torch.device) -> None:
    _, _, mask = drawn(*shape, device, torch.float32)
    with path():
        words = pack_mask(mask)
        found = unpack_mask(words, shape[1])
    assert torch.equal(words, pack_mask_reference(mask))
    assert torch.equal(found, mask)
    assert torch.equal(unpack_mask_reference(words, shape[1]), mask)
    # What stands behind the last column is 0, and counts for nothing where it is not.
    assert int(unpack_mask_reference(words, words.shape[1] * 32).sum()) == int(mask.sum())
    with path():
        dirty = unpack_mask(torch.full_like(words, -1), shape[1])
    assert dirty.shape == mask.shape
    assert bool(dirty.all())


def test_the_order_of_bits(path: Path, device: torch.device) -> None:
    mask = torch.zeros(2, 40, dtype=torch.bool, device=device)
    mask[0, [0, 2, 31]] = True
    mask[1, 33] = True
    with path():
        assert pack_mask(mask).tolist() == [[5 - 2**31, 0], [0, 2]]
        # Every other row and column: not contiguous.
        assert pack_mask(mask[:, ::2]).tolist() == [[3], [0]]
        assert torch.equal(pack_mask(mask.t()), pack_mask_reference(mask.t()))
        wide = pack_mask(mask).repeat(1, 2)
        assert torch.equal(unpack_mask(wide[:, ::2], 40), unpack_mask_reference(wide[:, ::2], 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_against_the_definition(
    shape: tuple[int, int], dtype: torch.dtype, scale: float, path: Path, device: torch.device
) -> None:
    base, delta, mask = drawn(*shape, device, dtype)
    words = pack_mask_reference(mask)
    with path():
        found = masked_delta(base, delta, words, scale)
    wanted = masked_delta_reference(base.double(), delta.double(), words, scale)
    assert found.dtype == dtype
    assert_within(found, wanted, base.double().abs() + scale * delta.double().abs())
    assert torch.equal(found[~mask], base[~mask])


def test_float32_and_pytorch_are_exactly_the_definition(path: Path, device: torch.device) -> None:
    base, delta, mask = drawn(37, 45, device, torch.float32)
    words = pack_mask_reference(mask)
    with path():
        assert torch.equal(masked_delta(base, delta, words), masked_delta_reference(base, delta, words))
        mixed = masked_delta(base, delta.bfloat16(), words)
        scaled = masked_delta(base, delta, words, 0.37)
    assert torch.equal(mixed, masked_delta_reference(base, delta.bfloat16(), words))
    assert torch.equal(scaled, masked_delta_reference(base, delta, words, 0.37))
    if not INTERPRETED or path is contextlib.nullcontext:
        halves = masked_delta(base.bfloat16(), delta.bfloat16(), words, 0.37)
        assert torch.equal(halves, masked_delta_reference(base.bfloat16(), delta.bfloat16(), words, 0.37))


def test_extremes(path: Path, device: torch.device) -> None:
    base = torch.tensor([[-0.0, 1e38, 5.0, 1.0, -0.0, torch.inf]], device=device)
    delta = torch.tensor([[0.0, 3e38, torch.nan, torch.inf, 1.0, 1.0]], device=device)
    words = pack_mask_reference(torch.tensor([[True, True, False, False, False, True]], device=device))
    with path():
        found = masked_delta(base, delta, words)
        nothing = masked_delta(base, delta, torch.zeros_like(words))
    # What is not in the mask does not matter, whatever it is; a negative zero stays one.
    assert found.tolist() == [[0.0, torch.inf, 5.0, 1.0, 0.0, torch.inf]]
    assert torch.equal(found.signbit(), base.signbit())
    assert torch.equal(nothing, base)
    assert torch.equal(nothing.signbit(), base.signbit())


def test_not_contiguous(path: Path, device: torch.device) -> None:
    base, delta, mask = drawn(40, 66, device, torch.float32)
    words = pack_mask_reference(mask.t()[::2, ::3].contiguous())
    with path():
        found = masked_delta(base.t()[::2, ::3], delta.t()[::2, ::3], words)
    assert torch.equal(found, torch.where(mask, base + delta, base).t()[::2, ::3])


def test_gradients(path: Path, device: torch.device) -> None:
    base, delta, mask = drawn(4, 37, device, torch.float64)
    delta[:, ::5] = 0  # A difference of 0 has a gradient as every other.
    words = pack_mask_reference(mask)
    inputs = (base.requires_grad_(), delta.requires_grad_())
    assert torch.autograd.gradcheck(lambda b, d: masked_delta_reference(b, d, words, 0.7), inputs)
    with path():
        assert torch.autograd.gradcheck(lambda b, d: masked_delta(b, d, words, 0.7), inputs)
    for dtype in (torch.float32, torch.bfloat16):
        pair = [one.detach().to(dtype).requires_grad_() for one in inputs]
        weight = torch.linspace(-1, 1, 37, device=device)
        with path():
            (masked_delta(*pair, words, 0.7) * weight).sum().backward()
        grad = weight.to(dtype).double().expand(4, 37)
        for one, wanted in zip(pair, (grad, torch.where(mask, grad * 0.7, 0)), strict=True):
            assert one.grad is not None
            assert one.grad.dtype == dtype
            assert_within(one.grad, wanted, factor=2)


def test_ops_are_whole(path: Path, device: torch.device) -> None:
    base, delta, mask = drawn(3, 40, device, torch.float32)
    words = pack_mask_reference(mask)
    graftwork = torch.ops.graftwork
    with path():
        torch.library.opcheck(graftwork.pack_mask.default, (mask,))
        torch.library.opcheck(graftwork.unpack_mask.default, (words, 40))
        trained = (base.requires_grad_(), delta.requires_grad_(), words, 0.5)
        torch.library.opcheck(graftwork.masked_delta.default, trained)


def test_compiled_and_under_autocast(path: Path, device: torch.device) -> None:
    base, delta, mask = drawn(3, 40, device, torch.float32)

    def whole(base: torch.Tensor, delta: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        words = pack_mask(mask & unpack_mask(pack_mask(mask), 40))
        return masked_delta(base, delta, words, 0.5)

    with path():
        expected = whole(base, delta, mask)
        assert torch.equal(
            torch.compile(whole, fullgraph=True, backend="aot_eager")(base, delta, mask), expected
        )
        with torch.autocast(device.type, torch.bfloat16):
            assert torch.equal(whole(base, delta, mask), expected)


def test_paths_agree(device: torch.device) -> None:
    if not INTERPRETED:
        pytest.skip("a GPU has one path")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base, delta, mask = drawn(9, 77, device, dtype)
        words = pack_mask_reference(mask)
        plain = masked_delta(base, delta, words, 0.9)
        with interpreting():
            kernel = masked_delta(base, delta, words, 0.9)
        far = (kernel.double() - plain.double()).abs() / (base.double().abs() + delta.double().abs())
        assert float(far.max()) <= BOUNDS[dtype]


def test_what_is_refused() -> None:
    base, words = torch.zeros(2, 40), torch.zeros(2, 2, dtype=torch.int32)
    for call, sentence in [
        (lambda: pack_mask(base), "bool matrix"),
        (lambda: pack_mask(torch.ones(3, dtype=torch.bool)), "bool matrix"),
        (lambda: unpack_mask(words, 65), "has 3 int32 words"),
        (lambda: unpack_mask(words.long(), 40), "torch.int64"),
        (lambda: masked_delta(base, base[:1], words), "one shape"),
        (lambda: masked_delta(base, base.long(), words), "floating point"),
        (lambda: masked_delta(base, base, words[:1]), "1 rows, and the base has 2"),
        (lambda: masked_delta(base, base, words[:, :1]), "has 2 int32 words"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            call()
