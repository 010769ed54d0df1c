"""Folding and adding a region's change, against their definitions in float64, on both paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork_kernels import dispatch
from graftwork_kernels.region_update import fold_rows, region_update_, region_update_reference
from graftwork_kernels.testing import BOUNDS, assert_within
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs Triton")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Of y, x and F: all alike, a half-precision layer with its change in fp32, and a layer that reads fp32.
DTYPES = [
    (FP32, FP32, FP32),
    (BF16, BF16, BF16),
    (FP16, FP16, FP16),
    (BF16, BF16, FP32),
    (FP16, FP16, FP32),
    (BF16, FP32, FP32),
]
# Tokens, inputs, outputs, neurons: several tiles, all neurons, one of everything, none of something.
SHAPES = [(70, 40, 150, 67), (5, 8, 6, 6), (1, 1, 1, 1), (0, 4, 5, 2), (3, 4, 5, 0)]


@pytest.fixture(params=["kernel", "pytorch"])
def path(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "kernel":
        request.getfixturevalue("kernels")
    elif device.type == "cuda":
        monkeypatch.setattr(dispatch, "fused", lambda *_: False)
    return request.param


def a_case(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = (FP32,) * 3, device: Any = "cpu"
) -> list[torch.Tensor]:
    tokens, inputs, outputs, neurons = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, outputs), (tokens, inputs), (neurons, inputs))
    given = [
        torch.randn(*size, generator=generator).to(device, dtype)
        for size, dtype in zip(sizes, dtypes, strict=True)
    ]
    rows = torch.randperm(outputs, generator=generator)[:neurons].sort().values
    return [*given, rows.to(device, torch.int32)]


def exact(
    y: torch.Tensor, x: torch.Tensor, change: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return the definition in float64, and the size of what is summed."""
    wide = [t.double() for t in (y, x, change)]
    return region_update_reference(*wide, rows), region_update_reference(*(t.abs() for t in wide), rows)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_definition_in_place(
    path: str, device: torch.device, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    y, x, change, rows = a_case(shape, dtypes, device)
    before = y.clone()
    wanted, size = exact(y, x, change, rows)
    assert region_update_(y, x, change, rows) is y
    # Without a kernel the product is rounded before it is added.
    assert_within(y, wanted, size, factor=1 if path == "kernel" else 2)
    others = torch.ones(y.shape[1], dtype=torch.bool, device=device)
    others[rows.long()] = False
    assert torch.equal(y[:, others], before[:, others])


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[3], SHAPES[4]], ids=str)
def test_gradients_are_those_of_the_definition(
    path: str, device: torch.device, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    y, x, change, rows = a_case(shape, dtypes, device)
    own = [tensor.clone().requires_grad_() for tensor in (y, x, change)]
    push = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device, y.dtype)
    found = torch.autograd.grad(region_update_(own[0] * 1, own[1], own[2], rows), own, push)
    assert torch.equal(found[0], push)
    g = push[:, rows.long()].double()
    for one, left, right, source in ((found[1], g, change.double(), x), (found[2], g.T, x.double(), change)):
        assert one.dtype == source.dtype
        assert_within(one, left @ right, left.abs() @ right.abs())


def test_a_change_in_fp32_is_not_rounded_to_bf16(kernels: None, device: torch.device) -> None:
    """x in bf16, F in fp32, y in fp32 to see it: as exact as a product in fp32."""
    y, x, change, rows = a_case((40, 64, 90, 33), (FP32, BF16, FP32), device)
    # Parts that 8 and 16 bits of mantissa drop.
    change = 1 + change.sign() * 2.0**-12 + change * 2.0**-18
    wanted, size = exact(y, x, change, rows)
    region_update_(y, x, change, rows)
    assert_within(y, wanted, size)
    rounded, _ = exact(y, x, change.bfloat16(), rows)
    assert ((rounded - wanted).abs() / size).max() > 20 * BOUNDS[FP32]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("input_trains", [True, False])
def test_behind_a_frozen_linear_layer(
    path: str, device: torch.device, bias: bool, input_trains: bool
) -> None:
    """In place on the output of a layer that has no gradient of its own, in three dimensions."""
    _, x, change, rows = a_case((12, 10, 9, 4), device=device)
    layer = nn.Linear(10, 9, bias=bias, device=device).requires_grad_(False)
    x = x.view(3, 4, 10).requires_grad_(input_trains)
    change.requires_grad_()
    y = region_update_(layer(x), x, change, rows)
    wants = [change, x] if input_trains else [change]
    found = torch.autograd.grad(y.sin().sum(), wants)
    weight = layer.weight.index_add(0, rows, change)
    wanted = torch.autograd.grad(F.linear(x, weight, layer.bias).sin().sum(), wants)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_nothing_of_the_outputs_size_is_kept_or_made(kernels: None, device: torch.device) -> None:
    y, x, change, rows = a_case((16, 12, 300, 4), device=device)
    kept: list[torch.Size] = []
    place = y.data_ptr()
    change.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        out = region_update_(y, x, change, rows)
    assert out.data_ptr() == place
    assert kept == [x.shape, change.shape, rows.shape]


def test_what_is_not_contiguous(path: str, device: torch.device) -> None:
    y, x, change, rows = a_case((12, 10, 9, 4), device=device)
    wanted, size = exact(y, x, change, rows)
    odd = (
        torch.cat([x, x], -1)[:, ::2].T.contiguous().T,
        change.T.contiguous().T,
        torch.stack([rows, rows], 1)[:, 0],
    )
    wanted, size = exact(y, *odd)
    apart = torch.stack([y, y], 2)[..., 0]
    assert not any(t.is_contiguous() for t in (*odd, apart))
    assert_within(region_update_(y.clone(), *odd), wanted, size)
    assert_within(region_update_(apart, *odd), wanted, size)
    turned = rows.flip(0).long()
    wanted, size = exact(y, x, change, turned)
    assert_within(region_update_(y.clone(), x, change, turned), wanted, size)


def test_extremes(path: str, device: torch.device) -> None:
    y, x, change, rows = a_case((12, 10, 9, 4), (BF16, BF16, FP32), device)
    assert torch.equal(region_update_(y.clone(), x, change * 0, rows), y)
    assert torch.equal(region_update_(y.clone(), x * 0, change, rows), y)
    wanted, size = exact(y, x * 1e15, change * 1e15, rows)
    found = region_update_(y.clone(), x * 1e15, change * 1e15, rows)
    assert_within(found, wanted, size, factor=2)
    x[3] = float("nan")
    found = region_update_(y.clone(), x, change, rows)
    assert found[3, rows.long()].isnan().all()
    assert found.isnan().sum() == 4


@pytest.mark.parametrize("complement", [True, False])
@pytest.mark.parametrize("width", [0, 3, 8])
def test_folding_stays_out_of_the_protected_span(complement: bool, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q[:, :width]
    inside = basis @ basis.T
    p = inside if complement else torch.eye(8).double() - inside
    torch.testing.assert_close(fold_rows(theta, basis, complement), theta @ p)
    assert_within(
        fold_rows(theta.float(), basis.float(), complement),
        theta @ p,
        theta.abs() + theta.abs() @ inside.abs(),
    )
    theta.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: fold_rows(t, basis, complement), theta)


def test_gradcheck_of_fold_and_update_together() -> None:
    y, x, theta, rows = a_case((3, 4, 5, 2))
    basis = torch.linalg.qr(torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).double()).Q
    given = [tensor.double().requires_grad_() for tensor in (y, x, theta)]
    assert torch.autograd.gradcheck(
        lambda y, x, t: region_update_(y * 1, x, fold_rows(t, basis), rows), given
    )
    assert torch.autograd.gradcheck(lambda y, x, t: region_update_reference(y, x, t, rows), given)


def test_opcheck(kernels: None, device: torch.device) -> None:
    y, x, change, rows = a_case((5, 8, 6, 3), device=device)
    torch.library.opcheck(torch.ops.graftwork.region_update_.default, (y, x, change, rows))
    for dtype in (FP32, BF16):
        torch.library.opcheck(torch.ops.graftwork.mixed_product.default, (x, change.T, dtype))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_without_a_break(path: str, device: torch.device, backend: str) -> None:
    _, x, change, rows = a_case((12, 10, 9, 4), device=device)
    layer = nn.Linear(10, 9, device=device).requires_grad_(False)
    basis = torch.linalg.qr(torch.randn(10, 3, device=device)).Q
    x.requires_grad_(), change.requires_grad_()

    def step(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        return region_update_(layer(x), x, fold_rows(theta, basis), rows).sin()

    torch._dynamo.reset()
    found, wanted = torch.compile(step, fullgraph=True, backend=backend)(x, change), step(x, change)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(y.sum(), (x, change)) for y in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_autocast_multiplies_in_its_dtype(path: str, device: torch.device) -> None:
    y, x, change, rows = a_case((12, 10, 9, 4), (BF16, FP32, FP32), device)
    wanted, size = exact(y, x.bfloat16(), change.bfloat16(), rows)
    change.requires_grad_()
    with torch.autocast(device.type, BF16):
        found = region_update_(y, x, change, rows)
    assert found.dtype == BF16
    assert_within(found, wanted, size, factor=2)
    found.float().sum().backward()
    assert change.grad is not None
    assert change.grad.dtype == FP32


def test_what_does_not_fit_is_refused() -> None:
    y, x, change, rows = a_case((3, 4, 5, 2))
    for wrong in (
        (y[:2], x, change, rows),
        (y, x[:, :3], change, rows),
        (y, x, change[:1], rows),
        (y[0], x[0], change, rows),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            region_update_(*wrong)
    with pytest.raises(
        ValueError, match=r"a basis of shape \(3, 1\) does not fit parameters of shape \(2, 4\)"
    ):
        fold_rows(change, torch.zeros(3, 1))
