from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from graftwork_kernels.scaled_quantize import (
    Rounding,
    fake_scaled_quantize,
    fake_scaled_quantize_reference,
    pack,
    scaled_quantize,
    scaled_quantize_reference,
    turned,
)
from graftwork_kernels.testing import BOUNDS, assert_within
from torch import Tensor

HALVES = (torch.float32, torch.bfloat16, torch.float16)
# Paley's first construction over the field of eleven elements: a core of order twelve.
_SQUARES = {1, 3, 4, 5, 9}


def core_12() -> Tensor:
    core = torch.ones(12, 12)
    for i in range(11):
        for j in range(11):
            core[i + 1, j + 1] = -1.0 if i == j else (1.0 if (i - j) % 11 in _SQUARES else -1.0)
    core[1:, 0] = -1.0
    core[1:, 1:] = -core[1:, 1:]
    core[0] = 1.0
    assert torch.equal(core @ core.T, 12 * torch.eye(12))
    return core


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact(x: Tensor, rounding: Rounding, **parts: Any) -> Tensor:
    """The reference in float64."""
    wide = {name: part.double() if isinstance(part, Tensor) else part for name, part in parts.items()}
    return fake_scaled_quantize_reference(x.double(), rounding, **wide)


def step(x: Tensor, rounding: Rounding, **parts: Any) -> Tensor:
    """The scale of every value in float64, as large as x."""
    block, core = parts.get("block", 1), parts.get("core")
    diagonal = parts.get("diagonal")
    wide = scaled_quantize_reference(
        x.double(), rounding, None if diagonal is None else diagonal.double(), block=block, core=core
    )
    return wide.scale.repeat_interleave(x.shape[-1] // wide.scale.shape[-1], -1)


def assert_rounded(found: Tensor, x: Tensor, rounding: Rounding, **parts: Any) -> None:
    """Values are those of float64 within the bound of their dtype, but for ties: these may be a level apart."""
    wanted, scale = exact(x, rounding, **parts), step(x, rounding, **parts)
    wrong = (found.double() - wanted).abs()
    bound = 4 * BOUNDS[found.dtype] * wanted.abs().maximum(scale)
    ties = wrong > bound
    # A value within float32's error of a tie, or of its scale, goes to either side.
    assert (wrong[ties] <= scale[ties] * 1.001 + bound[ties]).all()
    assert int(ties.sum()) <= max(1, found.numel() // 500)


SHAPES = [
    pytest.param((5, 40), 1, None, None, id="rows"),
    pytest.param((5, 40), 1, None, 8, id="groups"),
    pytest.param((1, 1), 1, None, None, id="one"),
    pytest.param((0, 24), 1, None, 8, id="none"),
    pytest.param((3, 7, 45), 1, None, None, id="odd"),
    pytest.param((70, 48), 16, None, 16, id="hadamard"),
    pytest.param((2, 2048), 512, None, None, id="wide"),
    pytest.param((3, 384), 192, 12, None, id="core"),
    pytest.param((3, 192), 192, 12, 8, id="core-groups"),
]


def parts_of(shape: tuple[int, ...], block: int, core: int | None) -> dict[str, Any]:
    return {
        "diagonal": numbers(shape[-1], seed=1).abs() + 0.1,
        "block": block,
        "core": None if core is None else core_12(),
    }


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "block", "core", "group"), SHAPES)
def test_kernel_equals_pytorch_and_float64(
    kernels: None, device: torch.device, shape: tuple[int, ...], block: int, core: int | None, group: int | None,
    symmetric: bool,
) -> None:  # fmt: skip
    x = numbers(*shape)
    rounding = Rounding(4, group, symmetric, half_range=symmetric, ratio=0.95)
    parts = parts_of(shape, block, core)
    there = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in parts.items()}
    assert_rounded(fake_scaled_quantize(x.to(device), rounding, **there).cpu(), x, rounding, **parts)
    codes, scale, zero = scaled_quantize(x.to(device), rounding, **there)
    wanted = scaled_quantize_reference(x, rounding, **parts)
    assert_within(scale, wanted.scale)
    assert int((codes.cpu() != wanted.codes).sum()) <= x.numel() // 500
    assert (zero is None) == symmetric
    if zero is not None and wanted.zero is not None:
        assert int((zero.cpu() - wanted.zero).abs().sum()) <= zero.numel() // 100
    packed = scaled_quantize(x.to(device), rounding, **there, packed=True)
    assert torch.equal(packed.codes, pack(codes, 4))
    assert torch.equal(packed.scale, scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_kernel_equals_pytorch_bit_for_bit_without_hadamard(
    kernels: None, device: torch.device, dtype: torch.dtype, symmetric: bool
) -> None:
    x, diagonal = numbers(9, 64, dtype=dtype), numbers(64, seed=1).abs()
    # Ties, which are rounded to even: multiples of half a level of the largest.
    x[0] = (torch.arange(64) % 15 - 7.0) / 2
    diagonal[0], x[0, 0] = 1.0, 7.0
    for bits, group in ((2, 16), (4, None), (8, 32)):
        rounding = Rounding(bits, group, symmetric)
        found = scaled_quantize(x.to(device), rounding, diagonal.to(device))
        wanted = scaled_quantize_reference(x, rounding, diagonal)
        assert torch.equal(found.codes.cpu(), wanted.codes)
        assert torch.equal(found.scale.cpu(), wanted.scale)
        fake = fake_scaled_quantize(x.to(device), rounding, diagonal.to(device), dtype=torch.float32)
        plain = fake_scaled_quantize_reference(x.float(), rounding, diagonal)
        assert torch.equal(fake.cpu(), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_within_its_bound(kernels: None, device: torch.device, dtype: torch.dtype) -> None:
    x, rounding = numbers(6, 64, dtype=dtype), Rounding(4, None, False)
    parts = parts_of((6, 64), 64, None)
    there = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in parts.items()}
    found = fake_scaled_quantize(x.to(device), rounding, **there)
    assert found.dtype == dtype
    assert_rounded(found.cpu(), x, rounding, **parts)


def test_rounds_half_to_even(kernels: None, device: torch.device) -> None:
    x = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7.0]], device=device)
    codes, scale, _ = scaled_quantize(x, Rounding(4))
    assert codes.tolist() == [[7, 0, 2, 2, 0, -2, -2, -7]]
    assert scale.tolist() == [[1.0]]


@pytest.mark.parametrize("path", ["kernels", "pytorch"])
def test_what_is_not_finite_leaves_nothing_of_its_slice(
    request: pytest.FixtureRequest, device: torch.device, path: str
) -> None:
    if path == "kernels":
        request.getfixturevalue("kernels")
    x = numbers(3, 16)
    x[0, 3], x[1, 9] = math.nan, -math.inf
    for symmetric in (True, False):
        rounding = Rounding(4, 8, symmetric)
        found = fake_scaled_quantize(x.to(device), rounding).cpu()
        bad = found.isnan().unflatten(1, (2, 8))
        assert bad.all(-1).tolist() == bad.any(-1).tolist() == [[True, False], [False, True], [False, False]]
        scale = scaled_quantize(x.to(device), rounding).scale
        assert scale.isfinite().tolist() == [[False, True], [True, False], [True, True]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_extremes(kernels: None, device: torch.device, symmetric: bool) -> None:
    rounding = Rounding(4, None, symmetric)
    x = torch.stack(
        [torch.zeros(32), torch.full((32,), 3.0), numbers(32) * 1e30, numbers(32) * 1e-30, -numbers(32).abs()]
    )
    found = fake_scaled_quantize(x.to(device), rounding).cpu()
    assert_rounded(found, x, rounding)
    assert not found[0].any()
    assert not found[3].any()  # below the floor of a scale
    assert torch.allclose(found[1], x[1])


def test_not_contiguous(kernels: None, device: torch.device) -> None:
    x = numbers(32, 6, 10).to(device)
    rounding, diagonal = Rounding(4, 16), numbers(64, seed=2).to(device)[::2]
    for view in (x.permute(1, 2, 0), x.permute(2, 1, 0)[::3]):
        found = scaled_quantize(view, rounding, diagonal)
        wanted = scaled_quantize(view.contiguous(), rounding, diagonal.contiguous())
        assert torch.equal(found.codes, wanted.codes)
        assert torch.equal(found.codes, scaled_quantize_reference(view, rounding, diagonal).codes)


@pytest.mark.parametrize(("bits", "columns"), [(2, 45), (4, 45), (8, 45), (4, 64), (2, 3)])
def test_packs_as_compressed_tensors_does(bits: int, columns: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    least = -(2 ** (bits - 1))
    codes = torch.randint(least, -least, (7, columns), dtype=torch.int8)
    codes[0, 0] = least
    assert torch.equal(pack(codes, bits), helpers.pack_to_int32(codes, bits))


@pytest.mark.parametrize(
    ("order", "core"), [(1, None), (8, None), (64, None), (128, None), (24, 12), (96, 12)]
)
def test_hadamard_is_the_kronecker_product(order: int, core: int | None) -> None:
    first = torch.ones(1, 1) if core is None else core_12()
    matrix = first.double()
    while len(matrix) < order:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    x = numbers(3, 2 * order, dtype=torch.float64)
    wanted = (x.unflatten(-1, (2, order)) @ matrix / math.sqrt(order)).flatten(-2)
    assert_within(turned(x, None, order, None if core is None else core_12()), wanted)


# ---------------------------------------------------------------------- gradients


def gradients(
    x: Tensor, grad: Tensor, rounding: Rounding, parts: dict[str, Any], call: Any
) -> dict[str, Tensor]:
    learned = {name: part for name, part in parts.items() if name in ("diagonal", "high", "low")}
    leaves = {name: part.detach().clone().requires_grad_() for name, part in {"x": x, **learned}.items()}
    call(leaves["x"], rounding, **{**parts, **{name: leaves[name] for name in learned}}).backward(grad)
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shares", ["none", "one", "each"])
@pytest.mark.parametrize(
    ("shape", "block", "core", "group"),
    [((5, 40), 1, None, 8), ((5, 64), 16, None, None), ((2, 192), 192, 12, 8)],
)
def test_gradients_of_the_kernel(
    kernels: None, device: torch.device, shape: tuple[int, ...], block: int, core: int | None, group: int | None,
    shares: str, symmetric: bool,
) -> None:  # fmt: skip
    x, grad = numbers(*shape), numbers(*shape, seed=3)
    if block == 1:
        # Extremes that occur twice, a slice of one sign, an empty slice.
        x[0, 1], x[1], x[2, :8] = x[0].max(), x[1].abs(), 0.0
    rounding, parts = Rounding(4, group, symmetric, ratio=0.9), parts_of(shape, block, core)
    slices = (*shape[:-1], shape[-1] // (group or shape[-1]))
    if shares == "each":
        parts |= {"high": 0.7 + 0.3 * torch.rand(slices), "low": 0.7 + 0.3 * torch.rand(slices)}
    elif shares == "one":
        parts |= {"high": torch.tensor(0.9), "low": torch.tensor(0.8)}
    there = {name: part.to(device) if isinstance(part, Tensor) else part for name, part in parts.items()}
    found = gradients(x.to(device), grad.to(device), rounding, there, fake_scaled_quantize)
    wanted = gradients(x, grad, rounding, parts, fake_scaled_quantize_reference)
    assert found.keys() == wanted.keys()
    for name in wanted:
        # Every entry of a gradient is a sum over a slice, over all rows, or over all.
        size = wanted[name].abs().max() if name != "x" else wanted[name].abs().mean()
        assert_within(found[name], wanted[name], wanted[name].abs().maximum(size), factor=4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_in_half_precision(kernels: None, device: torch.device, symmetric: bool) -> None:
    x, grad = numbers(4, 32, dtype=torch.bfloat16), numbers(4, 32, dtype=torch.bfloat16, seed=3)
    rounding, parts = Rounding(4, None, symmetric), {"diagonal": numbers(32, seed=1).abs() + 0.1}
    there = {"diagonal": parts["diagonal"].to(device)}
    found = gradients(x.to(device), grad.to(device), rounding, there, fake_scaled_quantize)
    wanted = gradients(x.float(), grad.float(), rounding, parts, fake_scaled_quantize_reference)
    assert found["x"].dtype == torch.bfloat16
    assert_within(found["x"], wanted["x"])
    assert_within(found["diagonal"], wanted["diagonal"], wanted["diagonal"].abs().max(), factor=4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradient_is_that_of_fixed_rounding_noise(symmetric: bool) -> None:
    """With rounding replaced by the noise that it adds here, finite differences give the straight-through gradient."""
    x, rounding = numbers(3, 16, dtype=torch.float64), Rounding(3, 8, symmetric, ratio=0.9)
    diagonal, high = numbers(16, dtype=torch.float64, seed=1).abs() + 0.5, torch.tensor(0.8).double()
    least, most = rounding.levels

    def parts(x: Tensor, diagonal: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = turned(x, diagonal, 8, None).unflatten(-1, (2, 8))
        hi = y.amax(-1, keepdim=True).clamp(min=0) * high * 0.9
        lo = y.amin(-1, keepdim=True).clamp(max=0) * high * 0.9
        scale = (torch.maximum(hi, -lo) if symmetric else hi - lo) / rounding.divisor
        zero = torch.zeros_like(scale) if symmetric else least - lo / scale
        return y, scale, zero

    y, scale, zero = parts(x, diagonal, high)
    noise_z = zero.round() - zero
    inside = (y / scale + zero.round()).clamp(least, most)
    noise_q = inside.round() - inside

    def smooth(x: Tensor, diagonal: Tensor, high: Tensor) -> Tensor:
        y, scale, zero = parts(x, diagonal, high)
        zero = zero + noise_z
        return (((y / scale + zero).clamp(least, most) + noise_q - zero) * scale).flatten(-2)

    leaves = [part.clone().requires_grad_() for part in (x, diagonal, high)]
    assert torch.autograd.gradcheck(smooth, leaves)
    grad = numbers(3, 16, dtype=torch.float64, seed=5)
    out = fake_scaled_quantize(leaves[0], rounding, leaves[1], block=8, high=leaves[2], low=leaves[2])
    assert_within(out, smooth(*leaves))
    for found, wanted in zip(
        torch.autograd.grad(out, leaves, grad),
        torch.autograd.grad(smooth(*leaves), leaves, grad),
        strict=True,
    ):
        assert_within(found, wanted)


def test_same_values_with_and_without_gradients() -> None:
    x, rounding = numbers(5, 64), Rounding(4, 16, False)
    leaf = x.clone().requires_grad_()
    assert torch.equal(
        fake_scaled_quantize(leaf, rounding, block=64), fake_scaled_quantize(x, rounding, block=64)
    )
    assert torch.equal(x, numbers(5, 64))


# ---------------------------------------------------------------------- torch


def test_operators(kernels: None, device: torch.device) -> None:
    x = numbers(3, 32).to(device).requires_grad_()
    diagonal = (numbers(32, seed=1).abs() + 0.1).to(device).requires_grad_()
    high = torch.tensor(0.9, device=device)
    how = (4, 16, 8, False, False, 1.0, 1e-8)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.graftwork.scaled_fake_quantize, (x, diagonal, None, high, high, *how, torch.float32),
        test_utils=checks,
    )  # fmt: skip
    flat = (x.detach(), diagonal.detach(), None)
    torch.library.opcheck(torch.ops.graftwork.scaled_quantize, (*flat, *how, True), test_utils=checks)
    torch.library.opcheck(
        torch.ops.graftwork.scaled_fake_quantize_backward, (x.detach(), *flat, high, high, *how), test_utils=checks
    )  # fmt: skip


@pytest.mark.parametrize("path", ["kernels", "pytorch"])
def test_compiles_whole(request: pytest.FixtureRequest, device: torch.device, path: str) -> None:
    if path == "kernels":
        request.getfixturevalue("kernels")
    x, rounding = numbers(3, 192).to(device), Rounding(4, 16, False)
    core, diagonal = core_12().to(device), torch.ones(192, device=device)

    def both(x: Tensor, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        fake = fake_scaled_quantize(x, rounding, diagonal, block=192, core=core)
        return fake, scaled_quantize(x, rounding, diagonal, block=192, core=core, packed=True).codes

    leaves = [x.clone().requires_grad_(), diagonal.clone().requires_grad_()]
    fake, codes = torch.compile(both, fullgraph=True, backend="aot_eager")(*leaves)
    wanted, same = both(*leaves)
    assert_within(fake, wanted)
    assert torch.equal(codes, same)
    for found, plain in zip(
        torch.autograd.grad(fake.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True
    ):
        assert_within(found, plain, plain.abs().max())


@pytest.mark.parametrize("path", ["kernels", "pytorch"])
def test_autocast_changes_nothing(request: pytest.FixtureRequest, device: torch.device, path: str) -> None:
    if path == "kernels":
        request.getfixturevalue("kernels")
    x, rounding = numbers(3, 64).to(device), Rounding(8)
    plain = fake_scaled_quantize(x, rounding, block=64)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(fake_scaled_quantize(x, rounding, block=64), plain)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rounding": Rounding(4, 7)}, "groups of 7 do not make up 32"),
        ({"rounding": Rounding(9)}, "2 to 8 bits"),
        ({"diagonal": torch.ones(31)}, r"diagonal of \(31,\)"),
        ({"block": 12}, "blocks of 12"),
        ({"block": 64}, "blocks of 64"),
        ({"block": 12, "core": torch.ones(12, 3)}, "a core is square"),
        ({"high": torch.ones(())}, "together"),
        ({"x": torch.ones(3, 0)}, "at least one value"),
    ],
)
def test_says_what_does_not_fit(change: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(2, 32), "rounding": Rounding(4), **change}
    with pytest.raises(ValueError, match=sentence):
        fake_scaled_quantize(arguments.pop("x"), arguments.pop("rounding"), **arguments)


def test_says_what_is_not_packed() -> None:
    with pytest.raises(ValueError, match="3 bits are not packed"):
        scaled_quantize(torch.ones(2, 32), Rounding(3), packed=True)
