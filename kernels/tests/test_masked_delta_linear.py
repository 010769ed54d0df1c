"""Tokens take their own weights: kernel and PyTorch path against every token computed with every route."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from graftwork_kernels.dispatch import HAS_TRITON, INTERPRETED, interpreting
from graftwork_kernels.masked_delta import masked_delta_reference, pack_mask_reference
from graftwork_kernels.masked_delta_linear import (
    BASE,
    masked_delta_linear,
    masked_delta_linear_reference,
)
from graftwork_kernels.testing import BOUNDS, assert_within

Path = Callable[[], contextlib.AbstractContextManager[None]]


@pytest.fixture(params=["pytorch", "kernel"])
def path(request: pytest.FixtureRequest) -> Path:
    """Both paths; on a GPU the kernel only, as the PyTorch path is not taken there."""
    if request.param == "kernel":
        return interpreting if INTERPRETED else contextlib.nullcontext
    if not INTERPRETED and torch.cuda.is_available():
        pytest.skip("a GPU takes the kernel")
    return contextlib.nullcontext


@dataclass
class Inputs:
    """Arguments of the op, and the sizes that enter each output: sums of |x| |w| and of |grad| |w|."""

    x: torch.Tensor
    weight: torch.Tensor
    delta: torch.Tensor
    words: torch.Tensor
    routes: torch.Tensor
    scales: torch.Tensor | None

    def call(self, op: Any = masked_delta_linear) -> torch.Tensor:
        return op(self.x, self.weight, self.delta, self.words, self.routes, self.scales)

    def exact(self) -> Inputs:
        """The same numbers in float64."""
        return Inputs(
            self.x.double(), self.weight.double(), self.delta.double(), self.words, self.routes, self.scales
        )

    def sizes(self) -> Inputs:
        return Inputs(
            self.x.double().abs(),
            self.weight.double().abs() + self.delta.double().abs(),
            torch.zeros_like(self.delta, dtype=torch.float64),
            self.words,
            self.routes,
            None,
        )


def drawn(
    tokens: int,
    inputs: int,
    outputs: int,
    masks: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    scaled: bool = False,
) -> Inputs:
    source = torch.Generator().manual_seed(tokens + inputs + outputs)
    x = torch.randn(tokens, inputs, generator=source)
    weight, delta = torch.randn(2, outputs, inputs, generator=source)
    mask = torch.rand(masks, outputs, inputs, generator=source) < 0.4
    words = torch.stack([pack_mask_reference(one) for one in mask]) if masks else torch.zeros(
        0, outputs, -(-inputs // 32), dtype=torch.int32
    )  # fmt: skip
    routes = torch.randint(BASE, masks, (tokens,), generator=source)
    scales = torch.rand(masks, generator=source).to(device) + 0.5 if scaled else None
    return Inputs(
        x.to(device, dtype),
        weight.to(device, dtype),
        (delta / 2).to(device, dtype),
        words.to(device),
        routes.to(device),
        scales,
    )


SHAPES = [
    (1, 1, 1, 1),
    (5, 33, 17, 2),
    (40, 64, 16, 3),
    (70, 100, 37, 3),
    (0, 8, 8, 2),
    (3, 8, 0, 1),
    (4, 40, 8, 0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_against_the_definition(
    shape: tuple[int, int, int, int], dtype: torch.dtype, scaled: bool, path: Path, device: torch.device
) -> None:
    given = drawn(*shape, device, dtype, scaled)
    given.x.requires_grad_()
    with path():
        found = given.call()
        grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found)
        found.backward(grad)
    exact, sizes = given.exact(), given.sizes()
    exact.x = exact.x.detach().requires_grad_()
    wanted = exact.call(masked_delta_linear_reference)
    wanted.backward(grad.double())
    assert found.dtype == dtype
    # The weights are rounded to the dtype as well as the result.
    assert_within(found, wanted, sizes.call(masked_delta_linear_reference), factor=2)
    assert given.x.grad is not None
    assert exact.x.grad is not None
    assert_within(given.x.grad, exact.x.grad, grad.double().abs() @ sizes.weight, factor=2)


@pytest.mark.parametrize(("tokens", "dtype"), [(80, torch.float32), (516, torch.bfloat16)])
def test_more_tokens_take_larger_blocks(tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    given = drawn(tokens, 70, 130, 1, device, dtype)
    given.x.requires_grad_()
    exact, sizes = given.exact(), given.sizes()
    with interpreting() if INTERPRETED else contextlib.nullcontext():
        found = given.call()
        (grad,) = torch.autograd.grad(found, given.x, torch.ones_like(found))
    wanted = exact.call(masked_delta_linear_reference)
    assert_within(found, wanted, sizes.call(masked_delta_linear_reference), factor=2)
    (own,) = torch.autograd.grad(wanted.sum(), given.x)
    assert_within(grad, own, sizes.weight.sum(0).expand_as(grad), factor=2)


def test_every_token_has_its_own_weights(path: Path, device: torch.device) -> None:
    """One route at a time is a dense layer with the rebuilt weights; rows do not depend on their neighbours."""
    given = drawn(12, 45, 20, 3, device)
    with path():
        mixed = given.call()
        for route in range(-1, 3):
            dense = given.weight
            if route >= 0:
                dense = masked_delta_reference(given.weight, given.delta, given.words[route])
            given.routes = torch.where(given.routes == route, route, given.routes)
            mine = given.routes == route
            torch.testing.assert_close(mixed[mine], given.x[mine] @ dense.t(), rtol=1e-5, atol=1e-5)
            whole = masked_delta_linear(
                given.x, given.weight, given.delta, given.words, torch.full_like(given.routes, route)
            )
            torch.testing.assert_close(whole[mine], mixed[mine], rtol=1e-5, atol=1e-5)
            assert route == BASE or not torch.allclose(whole, given.x @ given.weight.t(), atol=0.1)


def test_shapes_and_strides(path: Path, device: torch.device) -> None:
    given = drawn(24, 45, 20, 3, device)
    wanted = given.call(masked_delta_linear_reference)
    with path():
        many = masked_delta_linear(
            given.x.view(2, 3, 4, 45),
            given.weight,
            given.delta,
            given.words,
            given.routes.view(2, 3, 4).int(),
        )
        torch.testing.assert_close(many, wanted.view(2, 3, 4, 20), rtol=1e-5, atol=1e-5)
        one = masked_delta_linear(given.x[0], given.weight, given.delta, given.words, given.routes[0])
        torch.testing.assert_close(one, wanted[0], rtol=1e-5, atol=1e-5)
        strided = Inputs(
            given.x.repeat(1, 2)[:, ::2],
            given.weight.t().contiguous().t(),
            given.delta.repeat_interleave(2, 0)[::2],
            given.words.transpose(0, 1).contiguous().transpose(0, 1),
            given.routes.repeat_interleave(2)[::2],
            None,
        )
        torch.testing.assert_close(
            strided.call(), strided.call(masked_delta_linear_reference), rtol=1e-5, atol=1e-5
        )


def test_extremes(path: Path, device: torch.device) -> None:
    """What no mask chooses does not matter, whatever it is; large numbers stay finite in the sum."""
    given = drawn(6, 40, 9, 2, device)
    given.words[0] = 0
    given.words[1] = -1
    given.routes = torch.tensor([0, 1, BASE, 0, 1, 0], device=device)
    given.delta[:, 3] = torch.nan
    given.delta[:, 5] = torch.inf
    with path():
        found = given.call()
    unchanged = given.routes != 1
    torch.testing.assert_close(
        found[unchanged], (given.x @ given.weight.t())[unchanged], rtol=1e-5, atol=1e-5
    )
    assert bool(found[~unchanged].isnan().all())
    half = drawn(2, 64, 3, 1, device, torch.float16)
    half.x.fill_(200)
    half.weight.copy_(torch.tensor([300.0, -300.0], device=device).repeat(32))
    half.delta.zero_()
    with path():
        assert half.call().tolist() == [[0.0] * 3] * 2


def test_gradients_in_float64(device: torch.device) -> None:
    given = drawn(5, 35, 6, 2, device, torch.float64, scaled=True)
    given.x.requires_grad_()
    rest = (given.weight, given.delta, given.words, given.routes, given.scales)
    assert torch.autograd.gradcheck(lambda x: masked_delta_linear_reference(x, *rest), (given.x,))
    assert torch.autograd.gradcheck(lambda x: masked_delta_linear(x, *rest), (given.x,))
    assert torch.autograd.gradgradcheck(lambda x: masked_delta_linear(x, *rest), (given.x,))


def test_op_is_whole_and_compiles(path: Path, device: torch.device) -> None:
    given = drawn(5, 35, 6, 2, device, scaled=True)
    x = given.x.requires_grad_()
    rest = (given.weight, given.delta, given.words, given.routes, given.scales)
    whole: Any = torch.compile(masked_delta_linear, fullgraph=True, backend="aot_eager")
    with path():
        # Two kernels that sum in other orders may differ in the last bits.
        torch.library.opcheck(torch.ops.graftwork.masked_delta_linear.default, (x, *rest))
        expected = given.call()
        (grad,) = torch.autograd.grad(expected.sum(), x)
        found = whole(x, *rest)
        (own,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(found, expected)
    assert torch.equal(own, grad)


def test_autocast(path: Path, device: torch.device) -> None:
    given = drawn(5, 35, 6, 2, device)
    given.x.requires_grad_()
    whole: Any = torch.compile(masked_delta_linear, fullgraph=True, backend="eager")
    with path(), torch.autocast(device.type, torch.bfloat16):
        found = given.call()
        assert torch.equal(whole(given.x, given.weight, given.delta, given.words, given.routes), found)
    assert found.dtype == torch.bfloat16
    # Weights are rebuilt in their own precision and then rounded, as x is.
    sizes = given.sizes().call(masked_delta_linear_reference)
    assert_within(found, given.exact().call(masked_delta_linear_reference), sizes, factor=3)
    found.float().sum().backward()
    assert given.x.grad is not None
    assert given.x.grad.dtype == torch.float32


def test_paths_agree(device: torch.device) -> None:
    if not INTERPRETED:
        pytest.skip("a GPU has one path")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = drawn(21, 66, 19, 3, device, dtype, scaled=True)
        plain = given.call()
        with interpreting():
            kernel = given.call()
        far = (kernel.double() - plain.double()).abs() / given.sizes().call(masked_delta_linear_reference)
        assert float(far.max()) <= 2 * BOUNDS[dtype]


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("tokens", "masks", "size"), [(1, 3, 16), (16, 1, 16), (33, 3, 16), (100, 7, 32), (5, 0, 16)]
)
def test_blocks_hold_every_token_once(tokens: int, masks: int, size: int) -> None:
    from graftwork_kernels.masked_delta_linear_triton import blocks_of

    for routes in (
        torch.randint(BASE, masks, (tokens,), generator=torch.Generator().manual_seed(tokens)),
        torch.full((tokens,), masks - 1),
    ):
        order, blocks = blocks_of(routes, masks, size)
        seen: list[int] = []
        for route, start, stop in blocks.tolist():
            assert 0 <= stop - start <= size
            mine = order[start:stop].tolist()
            assert all(int(routes[token]) == route for token in mine)
            seen += mine
        assert sorted(seen) == list(range(tokens))


def test_what_is_refused(device: torch.device) -> None:
    def call(**changes: Any) -> torch.Tensor:
        given = drawn(5, 35, 6, 2, device)
        for name, value in changes.items():
            setattr(given, name, value)
        return given.call()

    for changes, sentence in [
        ({"words": torch.zeros(2, 6, 1, dtype=torch.int32)}, "K x 6 x 2"),
        ({"words": torch.zeros(2, 6, 2)}, "torch.float32"),
        ({"x": torch.zeros(5, 34)}, r"tokens are ... x 35"),
        ({"routes": torch.zeros(4, dtype=torch.long)}, "a route for each"),
        ({"routes": torch.zeros(5)}, "whole numbers"),
        ({"scales": torch.ones(3)}, "there are 2 masks"),
        ({"delta": torch.zeros(5, 35)}, "one shape"),
        ({"delta": torch.zeros(6, 35, requires_grad=True)}, "frozen"),
        ({"weight": torch.zeros(6, 35, requires_grad=True)}, "frozen"),
        ({"x": torch.zeros(5, 35, dtype=torch.bfloat16)}, "to be alike"),
        ({"routes": torch.tensor([0, 1, 2, 0, 0])}, "there is no route 2"),
        ({"routes": torch.tensor([0, 1, -2, 0, 0])}, "there is no route -2"),
    ]:
        if device.type == "cuda" and "no route" in sentence:
            continue
        with pytest.raises(ValueError, match=sentence):
            call(**changes)
