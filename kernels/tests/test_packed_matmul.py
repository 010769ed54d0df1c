from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork_kernels.packed_matmul import packed_matmul, packed_matmul_reference, unpacked
from graftwork_kernels.scaled_quantize import pack
from graftwork_kernels.testing import assert_within
from torch import Tensor


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def case(
    n: int, k: int, groups: int, bits: int, *, zero: bool = True, rank: int = 5, extras: bool = True,
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments of a product but its input."""
    generator = torch.Generator().manual_seed(seed)
    least = -(2 ** (bits - 1))
    codes = torch.randint(least, -least, (n, k), dtype=torch.int8, generator=generator)
    zeros = torch.randint(least, -least, (n, groups), dtype=torch.int8, generator=generator)
    made: dict[str, Any] = {
        "packed": pack(codes, bits),
        "scale": (numbers(n, groups, seed=seed + 1).abs() + 0.1).to(dtype),
        "zero": pack(zeros.t(), bits).t().contiguous() if zero else None,
        "bits": bits,
    }
    if extras:
        made |= {
            "into": (numbers(k, seed=seed + 2).abs() + 0.1).to(dtype),
            "out": (numbers(n, seed=seed + 3).abs() + 0.1).to(dtype),
            "correction": (
                numbers(n, rank, dtype=dtype, seed=seed + 4),
                numbers(rank, k, dtype=dtype, seed=seed + 5),
            ),
            "bias": numbers(n, dtype=dtype, seed=seed + 6),
        }
    return moved(made, device)


def moved(arguments: dict[str, Any], device: torch.device | str, wide: bool = False) -> dict[str, Any]:
    def one(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(map(one, part))
        if not isinstance(part, Tensor):
            return part
        return part.to(device, torch.float64 if wide and part.is_floating_point() else part.dtype)

    return {name: one(part) for name, part in arguments.items()}


def exact(x: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the product in float64, and the sum of its terms' sizes."""
    wide = moved(arguments, "cpu", wide=True)
    size = {
        key: part.abs() if isinstance(part, Tensor) and part.is_floating_point() else part
        for key, part in wide.items()
    }
    weight = unpacked(
        wide["packed"],
        wide["scale"],
        wide["zero"],
        bits=wide["bits"],
        columns=x.shape[-1],
        dtype=torch.float64,
    )
    into, out = size.get("into", torch.ones(1)), size.get("out", torch.ones(1))
    sizes = (x.cpu().double().abs() * into) @ weight.abs().T * out
    if wide.get("correction") is not None:
        left, right = wide["correction"]
        sizes = sizes + x.cpu().double().abs() @ right.abs().T @ left.abs().T
    if wide.get("bias") is not None:
        sizes = sizes + size["bias"]
    return packed_matmul_reference(x.cpu().double(), **wide), sizes


SHAPES = [
    (70, 45, 1),
    (3, 45, 9),
    (1, 1, 1),
    (65, 192, 3),
    (33, 128, 2),
    (20, 96, 2),
    (0, 16, 1),
    (40, 80, 5),
]


@pytest.mark.parametrize("path", ["kernels", "pytorch"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("n", "k", "groups"), SHAPES)
def test_equals_float64(
    request: pytest.FixtureRequest, device: torch.device, n: int, k: int, groups: int, bits: int, path: str
) -> None:
    if path == "kernels":
        request.getfixturevalue("kernels")
    for zero, extras in ((True, True), (False, False)):
        arguments = case(n, k, groups, bits, zero=zero, extras=extras)
        x = numbers(3, 7, k)
        found = packed_matmul(x.to(device), **moved(arguments, device))
        wanted, size = exact(x, arguments)
        assert found.shape == (3, 7, n)
        assert_within(found, wanted, size)


@pytest.mark.parametrize("path", ["kernels", "pytorch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(
    request: pytest.FixtureRequest, device: torch.device, dtype: torch.dtype, path: str
) -> None:
    if path == "kernels":
        request.getfixturevalue("kernels")
    arguments = case(40, 96, 3, 4, dtype=dtype)
    x = numbers(9, 96, dtype=dtype)
    found = packed_matmul(x.to(device), **moved(arguments, device))
    assert found.dtype == dtype
    wanted, size = exact(x, arguments)
    # Weights, scaled inputs and the correction's latents are rounded, too.
    assert_within(found, wanted, size, factor=4)


@pytest.mark.parametrize("rows", [0, 1, 17, 70])
def test_numbers_of_rows(kernels: None, device: torch.device, rows: int) -> None:
    arguments = case(34, 64, 1, 4)
    x = numbers(rows, 64)
    found = packed_matmul(x.to(device), **moved(arguments, device))
    assert_within(found, *exact(x, arguments))


def test_extremes(kernels: None, device: torch.device) -> None:
    arguments = case(20, 32, 2, 4)
    arguments["scale"][0] = 0.0
    arguments["scale"][1] = 1e30
    x = numbers(4, 32)
    x[0], x[1] = 0.0, x[1] * 1e6
    assert_within(packed_matmul(x.to(device), **moved(arguments, device)), *exact(x, arguments))
    x[2, 3] = float("nan")
    found = packed_matmul(x.to(device), **moved(arguments, device)).cpu()
    assert found[2].isnan().all()
    assert found[[0, 1, 3]].isfinite().all()


def test_rank_zero_corrects_nothing(kernels: None, device: torch.device) -> None:
    arguments = moved(case(20, 32, 2, 4, rank=0), device)
    x = numbers(4, 32).to(device)
    without = packed_matmul(x, **{**arguments, "correction": None})
    assert torch.equal(packed_matmul(x, **arguments), without)


def test_not_contiguous(kernels: None, device: torch.device) -> None:
    arguments = moved(case(20, 32, 2, 4), device)
    x = numbers(32, 6, 4).to(device).permute(2, 1, 0)[::2]
    strided = {
        **arguments,
        "scale": arguments["scale"].t().contiguous().t(),
        "packed": arguments["packed"].t().contiguous().t(),
    }
    assert torch.equal(packed_matmul(x, **strided), packed_matmul(x.contiguous(), **arguments))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("zero", [True, False])
def test_takes_the_tensors_of_a_checkpoint(
    kernels: None, device: torch.device, bits: int, zero: bool
) -> None:
    """What compressed-tensors packs is multiplied as what it unpacks."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    least, n, k, groups = -(2 ** (bits - 1)), 21, 48, 3
    codes = torch.randint(least, -least, (n, k), dtype=torch.int8)
    zeros = torch.randint(least, -least, (n, groups), dtype=torch.int8)
    scale, x = numbers(n, groups).abs() + 0.1, numbers(5, k)
    packed = helpers.pack_to_int32(codes, bits)
    packed_zero = helpers.pack_to_int32(zeros, bits, packed_dim=0) if zero else None
    shift = zeros.double().repeat_interleave(k // groups, 1) if zero else 0.0
    weight = (codes.double() - shift) * scale.double().repeat_interleave(k // groups, 1)
    found = packed_matmul(
        x.to(device), packed.to(device), scale.to(device),
        None if packed_zero is None else packed_zero.to(device), bits=bits,
    )  # fmt: skip
    assert_within(found, x.double() @ weight.T, x.double().abs() @ weight.abs().T)
    assert torch.equal(
        unpacked(packed, scale, packed_zero, bits=bits, columns=k, dtype=torch.float64), weight
    )


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("n", "k", "groups"), [(70, 45, 1), (3, 45, 9), (65, 192, 3)])
def test_gradient_of_the_kernel(kernels: None, device: torch.device, n: int, k: int, groups: int) -> None:
    for bits, extras in ((4, True), (2, False)):
        arguments = case(n, k, groups, bits, extras=extras)
        x, grad = numbers(19, k), numbers(19, n, seed=9)
        leaf = x.to(device, copy=True).requires_grad_()
        packed_matmul(leaf, **moved(arguments, device)).backward(grad.to(device))
        wide = x.detach().double().requires_grad_()
        packed_matmul_reference(wide, **moved(arguments, "cpu", wide=True)).backward(grad.double())
        assert leaf.grad is not None
        assert wide.grad is not None
        assert_within(leaf.grad, wide.grad, wide.grad.abs().maximum(wide.grad.abs().mean()), factor=8)


def test_gradcheck_of_the_reference() -> None:
    arguments = moved(case(6, 10, 2, 4), "cpu", wide=True)
    x = numbers(3, 10, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: packed_matmul(x, **arguments), (x,))


def test_refuses_gradients_to_anything_else() -> None:
    arguments = case(6, 10, 2, 4)
    arguments["into"].requires_grad_()
    with pytest.raises(ValueError, match="gradients to its input only"):
        packed_matmul(numbers(3, 10), **arguments)
    with torch.no_grad():
        packed_matmul(numbers(3, 10), **arguments)


# ---------------------------------------------------------------------- torch


def test_operators(kernels: None, device: torch.device) -> None:
    arguments = moved(case(20, 32, 2, 4), device)
    left, right = arguments["correction"]
    x = numbers(5, 32).to(device).requires_grad_()
    parts = (
        arguments["packed"],
        arguments["scale"],
        arguments["zero"],
        arguments["into"],
        arguments["out"],
        left,
        right,
    )
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.graftwork.packed_matmul, (x, *parts, arguments["bias"], 4), test_utils=checks,
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    grad = numbers(5, 20).to(device)
    torch.library.opcheck(
        torch.ops.graftwork.packed_matmul_backward, (grad, *parts, 4, 32), test_utils=checks
    )


@pytest.mark.parametrize("path", ["kernels", "pytorch"])
def test_compiles_whole(request: pytest.FixtureRequest, device: torch.device, path: str) -> None:
    if path == "kernels":
        request.getfixturevalue("kernels")
    arguments = moved(case(20, 32, 2, 4), device)
    x = numbers(5, 32).to(device).requires_grad_()
    compiled = torch.compile(lambda x: packed_matmul(x, **arguments), fullgraph=True, backend="aot_eager")
    found, wanted = compiled(x), packed_matmul(x, **arguments)
    assert_within(found, wanted, wanted.abs().max())
    (one,), (other,) = torch.autograd.grad(found.sum(), x), torch.autograd.grad(wanted.sum(), x)
    assert_within(one, other, other.abs().max())


@pytest.mark.parametrize("path", ["kernels", "pytorch"])
def test_autocast_computes_in_its_dtype(
    request: pytest.FixtureRequest, device: torch.device, path: str
) -> None:
    if path == "kernels":
        request.getfixturevalue("kernels")
    arguments = moved(case(20, 32, 2, 4), device)
    x = numbers(5, 32).to(device).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        found = packed_matmul(x, **arguments)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, packed_matmul(x.bfloat16(), **arguments))
    found.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bits": 3}, "weights of 3 bits"),
        ({"packed": torch.zeros(6, 3, dtype=torch.int32)}, r"words \(6, 3\) for inputs of 10"),
        ({"scale": torch.ones(6, 3)}, r"scales \(6, 3\)"),
        ({"zero": torch.zeros(6, 2, dtype=torch.int32)}, r"int32 \(1, 2\) is wanted"),
        ({"into": torch.ones(9)}, "into has the shape"),
        ({"out": torch.ones(9)}, "out has the shape"),
        ({"bias": torch.ones(6, 1)}, "bias has the shape"),
        ({"correction": (torch.ones(6, 2), torch.ones(3, 10))}, "correction"),
    ],
)
def test_says_what_does_not_fit(change: dict[str, Any], sentence: str) -> None:
    arguments = {**case(6, 10, 2, 4), **change}
    with pytest.raises(ValueError, match=sentence):
        packed_matmul(numbers(3, 10), **arguments)
