"""The gated low-rank epilogue against its definition in float64, on both paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork_kernels import dispatch
from graftwork_kernels.gated_low_rank import gated_low_rank, gated_low_rank_reference
from graftwork_kernels.testing import assert_within
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs Triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Batch, tokens, inputs, outputs, rank: multiples of no block, one of everything, none of something, two rank blocks.
SHAPES = [
    (3, 37, 24, 70, 10),
    (2, 64, 32, 128, 16),
    (1, 1, 1, 1, 1),
    (0, 5, 8, 9, 2),
    (2, 0, 8, 9, 2),
    (2, 9, 20, 33, 80),
]


def a_case(
    shape: tuple[int, ...], dtype: torch.dtype, device: Any = "cpu", seed: int = 0
) -> list[torch.Tensor]:
    batch, tokens, inputs, outputs, rank = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator)

    base, x = random(batch, tokens, outputs), random(batch, tokens, inputs)
    a, b, gate = (
        random(rank, inputs) / inputs**0.5,
        random(outputs, rank),
        2 * torch.rand(batch, rank, generator=generator),
    )
    return [*(tensor.to(device, dtype) for tensor in (base, x, a, b)), gate.to(device)]


def exact(given: list[torch.Tensor], scale: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the definition in float64 from u as it is in the inputs' dtype, and the size of what is summed."""
    base, x, a, b, gate = given
    # u is a product of its own; what the op adds begins behind it.
    u = F.linear(x, a).double()
    wide = gate.double()[:, None]
    y = base.double() + F.linear(u * wide, b.double()) * scale
    return y, base.double().abs() + F.linear((u * wide).abs(), b.double().abs()) * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_is_the_definition(
    kernels: None, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    given = a_case(shape, dtype, device)
    y = gated_low_rank(*given, 0.5)
    assert y.dtype == dtype
    wanted, size = exact(given)
    # The product of u and the gate is rounded once before it is multiplied.
    assert_within(y, wanted, size, factor=2)
    ungated = gated_low_rank(*given[:4], scale=0.5)
    wanted, size = exact([*given[:4], torch.ones_like(given[4])])
    assert_within(ungated, wanted, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_pytorch_path_is_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = a_case(shape, dtype)
    wanted, size = exact(given)
    # Without a kernel the product is rounded before it is scaled and added.
    assert_within(gated_low_rank(*given, 0.5), wanted, size, factor=3)
    assert torch.equal(gated_low_rank(*given[:4], scale=0.5), gated_low_rank_reference(*given[:4], scale=0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[4], SHAPES[5]], ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_gradients_of_the_kernel_are_those_of_the_definition(
    kernels: None, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, gated: bool
) -> None:
    given = a_case(shape, dtype, device)[: 5 if gated else 4]
    own = [tensor.clone().requires_grad_() for tensor in given]
    wide = [tensor.double().requires_grad_() for tensor in given]
    push = torch.randn(own[0].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    found = torch.autograd.grad(gated_low_rank(*own, scale=0.5), own, push)
    wanted = torch.autograd.grad(gated_low_rank_reference(*wide, scale=0.5), wide, push.double())
    assert torch.equal(found[0], push)
    # What is summed, for the error to be measured against: the same gradients of absolute values.
    sizes = [tensor.double().abs().requires_grad_() for tensor in given]
    summed = torch.autograd.grad(gated_low_rank_reference(*sizes, scale=0.5), sizes, push.double().abs())
    for name, one, other, size in zip("xabg", found[1:], wanted[1:], summed[1:], strict=False):
        assert one.dtype == (torch.float32 if name == "g" else dtype)
        # Three products follow each other in the half precisions; the gate's sum has u's rounding and no more.
        bound = one.to(dtype) if name == "g" else one
        assert_within(bound, other, size, factor=4)


def test_the_gradient_of_the_gate_is_summed_in_fp32(kernels: None, device: torch.device) -> None:
    """2000 tokens that add 1 each, in bf16, whose own sum would stop at 256; on both paths."""
    tokens = 2000
    base, x = (torch.zeros(1, tokens, 1, dtype=torch.bfloat16, device=device) for _ in range(2))
    x, one = x + 1, torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    for path in (True, False):
        gate = torch.ones(1, 1, device=device, requires_grad=True)
        with pytest.MonkeyPatch.context() as patch:
            if not path:
                patch.setattr(dispatch, "fused", lambda *_: False)
            gated_low_rank(base, x, one, one, gate).sum().backward()
        assert gate.grad is not None
        assert gate.grad.item() == tokens


def test_nothing_of_the_outputs_size_is_kept(kernels: None, device: torch.device) -> None:
    given = a_case((2, 16, 12, 300, 4), torch.float32, device)
    own = [tensor.requires_grad_() for tensor in given]
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        gated_low_rank(*own)
    assert kept
    assert all(shape.numel() <= 2 * 16 * 12 or shape == (300, 4) for shape in kept)


def test_the_paths_agree_on_what_is_not_contiguous(device: torch.device) -> None:
    base, x, a, b, gate = a_case((3, 20, 24, 40, 6), torch.float32, device)
    odd = [
        base.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([x, x], -1)[..., ::2],
        a.T.contiguous().T,
        b.T.contiguous().T,
        torch.cat([gate, gate])[::2],
    ]
    assert not any(tensor.is_contiguous() for tensor in odd)
    plain = gated_low_rank(*odd)
    wanted, size = exact(odd, 1.0)
    assert_within(plain, wanted, size)
    if dispatch.INTERPRETED:
        with dispatch.interpreting():
            assert_within(gated_low_rank(*odd), wanted, size)
    else:
        pytest.skip("the other path runs on a CPU, and this test on a GPU")


def test_extremes(kernels: None, device: torch.device) -> None:
    base, x, a, b, gate = a_case(SHAPES[0], torch.bfloat16, device)
    assert torch.equal(gated_low_rank(base, x, a, torch.zeros_like(b), gate), base)
    assert torch.equal(gated_low_rank(base, x, a, b, torch.zeros_like(gate)), base)
    assert torch.equal(gated_low_rank(base, x * 0, a, b, gate), base)
    huge = base.clone()
    huge[0, 0, 0], huge[0, 1, 0], huge[0, 2, 0] = 3e38, float("inf"), float("nan")
    y = gated_low_rank(huge, x, a, b, gate)
    assert torch.equal(y[0, :2, 0], huge[0, :2, 0])
    assert y[0, 2, 0].isnan()
    assert y.isfinite().sum() == y.numel() - 2
    given = [base, x * 1e4, a, b * 1e4, gate]
    wanted, size = exact(given)
    assert_within(gated_low_rank(*given, 0.5), wanted, size, factor=2)


def test_gradcheck() -> None:
    given = [tensor.double().requires_grad_() for tensor in a_case((2, 3, 4, 5, 2), torch.float32)]
    assert torch.autograd.gradcheck(lambda *t: gated_low_rank(*t, 0.7), given)
    assert torch.autograd.gradcheck(lambda *t: gated_low_rank_reference(*t, 0.7), given)
    assert torch.autograd.gradcheck(lambda *t: gated_low_rank(*t, scale=0.7), given[:4])


def test_opcheck(kernels: None, device: torch.device) -> None:
    base, x, a, b, gate = a_case((2, 5, 8, 6, 3), torch.float32, device)
    u = F.linear(x, a)
    for own in (gate, None):
        given = [t if t is None else t.detach().requires_grad_() for t in (base, u, b, own)]
        torch.library.opcheck(torch.ops.graftwork.gated_low_rank.default, (*given, 0.5))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("fused", [True, False])
def test_it_compiles_without_a_break(device: torch.device, backend: str, fused: bool, request: Any) -> None:
    if fused:
        request.getfixturevalue("kernels")
    elif device.type == "cuda":
        pytest.skip("on a GPU kernels run")
    given = [tensor.requires_grad_() for tensor in a_case((2, 5, 8, 6, 3), torch.float32, device)]
    torch._dynamo.reset()
    compiled = torch.compile(gated_low_rank, fullgraph=True, backend=backend)
    found, wanted = compiled(*given, 0.5), gated_low_rank(*given, 0.5)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(*(torch.autograd.grad(y.sin().sum(), given) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("fused", [True, False])
def test_autocast_multiplies_in_its_dtype(device: torch.device, fused: bool, request: Any) -> None:
    """An adapter in fp32 on a base that autocast runs in bf16."""
    if fused:
        request.getfixturevalue("kernels")
    base, x, a, b, gate = a_case(SHAPES[0], torch.float32, device)
    base = base.bfloat16()
    a.requires_grad_(), b.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        y = gated_low_rank(base, x, a, b, gate, 0.5)
    assert y.dtype == torch.bfloat16
    low = [base, x.bfloat16(), a.detach().bfloat16(), b.detach().bfloat16(), gate]
    wanted, size = exact(low)
    assert_within(y, wanted, size, factor=3)
    y.float().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert (a.grad.dtype, b.grad.dtype) == (torch.float32, torch.float32)


def test_an_adapter_in_fp32_on_a_bf16_layer(kernels: None, device: torch.device) -> None:
    """Without autocast the product keeps the adapter's precision; only the sum is rounded."""
    base, x, a, b, gate = a_case(SHAPES[0], torch.float32, device)
    base, x = base.bfloat16(), x.bfloat16()
    own = b.clone().requires_grad_()
    y = gated_low_rank(base, x, a, own, gate, 0.5)
    assert y.dtype == torch.bfloat16
    wanted, size = exact([base, x.float(), a, b, gate])
    assert_within(y, wanted, size)
    wide = b.double().requires_grad_()
    push = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    (found,) = torch.autograd.grad(y, own, push)
    y = gated_low_rank_reference(base.double(), x.double(), a.double(), wide, gate.double(), 0.5)
    (wanted,) = torch.autograd.grad(y, wide, push.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    base, x, a, b, gate = a_case((2, 3, 4, 5, 2), torch.float32)
    with pytest.raises(ValueError, match=r"A and B must be \(rank x inputs\)"):
        gated_low_rank(base, x, a, b.T, gate)
    with pytest.raises(ValueError, match="they must be of one dtype"):
        gated_low_rank(base, x, a, b.bfloat16(), gate)
    with pytest.raises(ValueError, match=r"input \(2, 3, 3\) and output \(2, 3, 5\) do not fit"):
        gated_low_rank(base, x[..., :3], a, b, gate)
    with pytest.raises(ValueError, match=r"the gate must be \(rows x rank\) = \(2, 2\), not \(1, 2\)"):
        gated_low_rank(base, x, a, b, gate[:1])
