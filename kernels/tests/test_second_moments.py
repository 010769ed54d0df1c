"""Sums of x x^T against float64, on both paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork_kernels import dispatch, second_moments
from graftwork_kernels.second_moments import add_second_moments_, second_moments_reference
from graftwork_kernels.testing import assert_within

pytestmark = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs Triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Tokens, width: one tile, several, part of one, several parts of the tokens, one of each, none of something.
SHAPES = [(40, 64), (70, 150), (9, 5), (600, 20), (1, 1), (0, 4), (3, 0)]


@pytest.fixture(params=["kernel", "pytorch"])
def path(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "kernel":
        request.getfixturevalue("kernels")
    elif device.type == "cuda":
        monkeypatch.setattr(dispatch, "fused", lambda *_: False)
    return request.param


def a_case(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator)
    before = torch.randn(width, width, generator=generator)
    mask = torch.rand(tokens, generator=generator) < 0.6
    return (before + before.T).to(device), x.to(device, dtype), mask.to(device)


def hold(found: torch.Tensor, before: torch.Tensor, x: torch.Tensor, factor: float = 1.0) -> None:
    wide = x.double()
    wanted = second_moments_reference(before.double(), wide)
    assert_within(found, wanted, before.double().abs() + wide.abs().T @ wide.abs(), factor=factor)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_adds_what_the_definition_adds(
    path: str, device: torch.device, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """In fp32's bound whatever the inputs' dtype: their products are exact in fp32."""
    before, x, mask = a_case(*shape, dtype, device)
    found = before.clone()
    assert add_second_moments_(found, x) is found
    hold(found, before, x)
    masked = before.clone()
    add_second_moments_(masked, x, mask)
    hold(masked, before, x[mask])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_into_float64(path: str, device: torch.device, dtype: torch.dtype) -> None:
    before, x, mask = a_case(600, 40, dtype, device)
    large = 2.0**30 * before.double()
    found = add_second_moments_(large.clone(), x, mask)
    added = torch.zeros(40, 40, device=device)
    # What fp32 could not hold beside 2^30 is there.
    hold((found - large).float(), added, x[mask], factor=2)


def test_the_pytorch_path_in_steps_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moments, "_COLUMNS", 16)
    for width in (16, 17, 32, 50):
        before, x, mask = a_case(30, width, torch.float32, torch.device("cpu"))
        hold(add_second_moments_(before.clone(), x, mask), before, x[mask])


def test_more_tokens_than_an_accumulator_takes(
    kernels: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_moments.kernels, "MOST_TOKENS", 1)
    monkeypatch.setattr(second_moments.kernels, "_LEAST_TOKENS", 1)
    monkeypatch.setattr(second_moments.kernels, "_PROGRAMS", 4)
    before, x, mask = a_case(11, 6, torch.bfloat16, device)
    hold(add_second_moments_(before.clone(), x, mask), before, x[mask])


def test_every_tile_of_the_triangle_is_found(kernels: None, device: torch.device) -> None:
    """6 x 6 tiles, each entry of x^T x another number."""
    width = 64 * 6 - 3
    x = (torch.arange(2 * width, device=device) % 97).float().reshape(2, width)
    found = add_second_moments_(torch.zeros(width, width, device=device), x.bfloat16())
    assert torch.equal(found, x.T @ x)


def test_what_is_not_contiguous(path: str, device: torch.device) -> None:
    before, x, mask = a_case(40, 24, torch.bfloat16, device)
    odd, half = x.T.contiguous().T, torch.stack([mask, mask], 1)[:, 0]
    assert not odd.is_contiguous()
    assert not half.is_contiguous()
    hold(add_second_moments_(before.clone(), odd, half), before, x[mask])


def test_extremes(path: str, device: torch.device) -> None:
    before, x, mask = a_case(40, 24, torch.bfloat16, device)
    assert torch.equal(add_second_moments_(before.clone(), x, torch.zeros_like(mask)), before)
    assert torch.equal(add_second_moments_(before.clone(), x * 0), before)
    hold(add_second_moments_(before.clone(), x * 1e15), before, x * 1e15)
    # Padding may hold anything.
    dirty = torch.where(mask[:, None], x, torch.full_like(x, float("nan")))
    hold(add_second_moments_(before.clone(), dirty, mask), before, x[mask])
    dirty[mask.nonzero()[0], 3] = float("inf")
    found = add_second_moments_(before.clone(), dirty, mask)
    assert found[3, 3].isinf()
    assert not found[3].isfinite().any()
    assert found.isfinite().sum() == 23 * 23


def test_the_same_bits_every_time(path: str, device: torch.device) -> None:
    before, x, mask = a_case(600, 40, torch.bfloat16, device)
    first, second = (add_second_moments_(before.clone(), x, mask) for _ in range(2))
    assert torch.equal(first, second)


def test_opcheck(kernels: None, device: torch.device) -> None:
    before, x, mask = a_case(9, 5, torch.float32, device)
    for own in (mask, None):
        torch.library.opcheck(torch.ops.graftwork.add_second_moments_.default, (before.clone(), x, own))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_without_a_break(path: str, device: torch.device, backend: str) -> None:
    before, x, mask = a_case(20, 6, torch.bfloat16, device)
    torch._dynamo.reset()
    compiled: Any = torch.compile(add_second_moments_, fullgraph=True, backend=backend)
    found = before.clone()
    compiled(found, x, mask)
    torch.testing.assert_close(found, add_second_moments_(before.clone(), x, mask))


def test_autocast_does_not_round_the_sum(path: str, device: torch.device) -> None:
    before, x, mask = a_case(40, 24, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        found = add_second_moments_(before.clone(), x, mask)
    hold(found, before, x[mask])


def test_what_does_not_fit_is_refused() -> None:
    x, mask = torch.zeros(4, 3), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"not \(4, 3\) and \(4, 4\)"):
        add_second_moments_(torch.zeros(4, 4), x)
    with pytest.raises(ValueError, match=r"contiguous and in float32 or float64, not torch.bfloat16"):
        add_second_moments_(torch.zeros(3, 3).bfloat16(), x)
    with pytest.raises(ValueError, match=r"not torch.int64 of \(4,\) for 4 tokens"):
        add_second_moments_(torch.zeros(3, 3), x, mask.long())
