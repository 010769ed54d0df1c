"""Selected log-probabilities against log-softmax in float64, on both paths, and what neither of them ever makes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graftwork_kernels import selected_log_probs as op
from graftwork_kernels import selected_log_probs_blocks as blocks
from graftwork_kernels.selected_log_probs import selected_log_probs, selected_log_probs_reference
from graftwork_kernels.testing import BOUNDS, assert_within
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# N, D, V: no multiples of a block; one of everything; a row of blocks; no rows.
SHAPES = [(37, 20, 150), (1, 1, 1), (17, 70, 300), (0, 5, 9), (3, 16, 2)]
TRAINS = [flags for flags in itertools.product((False, True), repeat=3) if any(flags)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the PyTorch path take several blocks of rows and of words, the last ones smaller."""
    monkeypatch.setattr(blocks, "ROWS", 16)
    monkeypatch.setattr(blocks, "COLUMNS", 64)


@pytest.fixture(params=["pytorch", "triton"])
def path(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        request.getfixturevalue("kernels")
    return request.param


def problem(
    n: int, d: int, v: int, dtype: torch.dtype, device: torch.device | str = "cpu", scale: float = 1.0
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return [hidden, weight, bias] and labels."""
    generator = torch.Generator().manual_seed(n + 100 * d + v)
    shapes = [(n, d), (v, d), (v,)]
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[0] *= scale * 2 / d**0.5
    labels = torch.randint(v, (n,), generator=generator)
    return [tensor.to(device, dtype) for tensor in tensors], labels.to(device)


def with_gradients(
    function: Callable[..., Any], tensors: list[torch.Tensor], labels: torch.Tensor, trains: tuple[bool, ...]
) -> list[torch.Tensor]:
    """Return log-probabilities, entropies and the gradients of a weighted sum of both."""
    leaves = [t.detach().clone().requires_grad_(flag) for t, flag in zip(tensors, trains, strict=True)]
    selected, entropy = function(*leaves[:2], labels, *leaves[2:])
    weights = torch.linspace(-1, 2, len(labels), dtype=torch.float64, device=labels.device)
    (
        (selected * weights.to(selected.dtype)).sum()
        + 0.5 * (entropy * weights.flip(0).to(entropy.dtype)).sum()
    ).backward()
    found = [leaf.grad for leaf in leaves if leaf.requires_grad]
    assert all(gradient is not None for gradient in found)
    return [selected.detach(), entropy.detach(), *(gradient for gradient in found if gradient is not None)]


def with_entropies(*args: torch.Tensor) -> Any:
    return selected_log_probs(*args, entropies=True)


def sizes(tensors: list[torch.Tensor], labels: torch.Tensor) -> list[torch.Tensor]:
    """Return the sizes of the terms in values and gradients: of logits, of the weight's rows, of all hidden states."""
    hidden, weight, bias = (tensor.double().cpu() for tensor in tensors)
    logits = (hidden.abs() @ weight.abs().T + bias.abs()).amax(1, keepdim=True) + len(weight) ** 0.5
    of_hidden = 4 * logits * weight.abs().amax(0)
    of_logits = 4 * logits.amax() if len(labels) else torch.tensor(0.0, dtype=torch.float64)
    of_weight = of_logits * hidden.abs().sum(0).expand(weight.shape)
    return [
        logits[:, 0],
        logits[:, 0],
        of_hidden,
        of_weight,
        of_logits.expand(bias.shape) * max(len(labels), 1),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(
    shape: tuple[int, int, int], dtype: torch.dtype, path: str, device: torch.device
) -> None:
    tensors, labels = problem(*shape, dtype, device)
    exact = [tensor.double() for tensor in tensors]
    wanted = with_gradients(selected_log_probs_reference, exact, labels, (True, True, True))
    found = with_gradients(with_entropies, tensors, labels, (True, True, True))
    assert [one.dtype for one in found] == [torch.float32] * 2 + [dtype] * 3
    for one, other, size in zip(found, wanted, sizes(tensors, labels), strict=True):
        # What a kernel returns in float32 was not rounded to less; on CPU each logit was.
        rounds = one.dtype == dtype or path == "pytorch"
        assert_within(one.to(dtype) if rounds else one, other, size)


@pytest.mark.parametrize("trains", TRAINS)
def test_only_what_trains_has_a_gradient(trains: tuple[bool, ...], path: str, device: torch.device) -> None:
    """Where the hidden states alone learn, the path of PyTorch has their direction from the forward pass."""
    tensors, labels = problem(37, 20, 150, torch.float32, device)

    def alone(*args: torch.Tensor) -> Any:
        return selected_log_probs(*args), args[0].new_zeros(37)

    def reference(*args: torch.Tensor) -> Any:
        return selected_log_probs_reference(*args)[0], args[0].new_zeros(37)

    wanted = with_gradients(reference, [tensor.double() for tensor in tensors], labels, trains)
    found = with_gradients(alone, tensors, labels, trains)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entropies", [False, True])
@pytest.mark.parametrize("trains", [(True, False, False), (False, True, False), (True, True, True)])
def test_gradcheck(trains: tuple[bool, ...], entropies: bool) -> None:
    tensors, labels = problem(19, 3, 70, torch.float64)
    for tensor, flag in zip(tensors, trains, strict=True):
        tensor.requires_grad_(flag)

    def values(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        return selected_log_probs(hidden, weight, labels, bias, entropies=entropies)

    assert torch.autograd.gradcheck(values, tensors, fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: selected_log_probs_reference(hidden, weight, labels, bias),
        tensors,
        fast_mode=True,
    )


@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_large_logits_and_equal_ones(scale: float, path: str, device: torch.device) -> None:
    tensors, labels = problem(20, 12, 150, torch.float32, device, scale)
    if not scale:
        tensors[2].zero_()
    exact = [tensor.double() for tensor in tensors]
    wanted = with_gradients(selected_log_probs_reference, exact, labels, (True, True, True))
    found = with_gradients(with_entropies, tensors, labels, (True, True, True))
    for one, other, size in zip(found, wanted, sizes(tensors, labels), strict=True):
        assert_within(one, other, size)
    if not scale:
        torch.testing.assert_close(found[1], torch.full_like(found[1], 150.0).log())


def test_words_that_are_ruled_out(path: str, device: torch.device) -> None:
    """A bias of -inf; whole blocks of it, the first too; and a label among them."""
    (hidden, weight, bias), labels = problem(6, 4, 300, torch.float32, device)
    bias[:140] = -torch.inf
    bias[200] = -torch.inf
    labels = torch.tensor([150, 200, 299, 0, 141, 170], device=device)
    exact = [tensor.double() for tensor in (hidden, weight, bias)]
    wanted = selected_log_probs_reference(*exact[:2], labels, exact[2])
    found = selected_log_probs(hidden, weight, labels, bias, entropies=True)
    assert torch.isneginf(found[0]).tolist() == [False, True, False, True, False, False]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    hidden.requires_grad_()
    kept = torch.tensor([0, 2, 4, 5], device=device)
    for entropies in (False, True):
        found = with_gradients(
            lambda h, w, y, b, e=entropies: (
                selected_log_probs(h, w, y, b, entropies=True)
                if e
                else (selected_log_probs(h, w, y, b), h.new_zeros(4))
            ),
            [hidden[kept], weight, bias],
            labels[kept],
            (True, False, False),
        )
        assert found[-1].isfinite().all()


def test_all_words_ruled_out_or_no_number(path: str, device: torch.device) -> None:
    (hidden, weight, bias), labels = problem(3, 4, 150, torch.float32, device)
    bias.fill_(-torch.inf)
    assert selected_log_probs(hidden, weight, labels, bias).isnan().all()
    weight[100] = torch.nan
    assert selected_log_probs(hidden, weight, labels).isnan().all()


def test_what_is_not_contiguous(path: str, device: torch.device) -> None:
    (hidden, weight, bias), labels = problem(20, 12, 150, torch.float32, device)
    spread = (
        hidden.T.contiguous().T,
        weight.T.contiguous().T,
        labels.repeat(2)[::2],
        bias.repeat_interleave(2)[::2],
    )
    assert not any(tensor.is_contiguous() for tensor in spread)
    mixed = torch.stack([labels, labels + 1], 1)[:, 0]
    for one, other in zip(
        selected_log_probs(*spread[:2], mixed, spread[3], entropies=True),
        selected_log_probs(hidden, weight, labels, bias, entropies=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    leaf = hidden.T.contiguous().requires_grad_()
    selected_log_probs(leaf.T, weight, labels).backward(torch.ones(1, device=device).expand(20))
    exact = hidden.double().requires_grad_()
    selected_log_probs_reference(exact, weight.double(), labels)[0].sum().backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(leaf.grad.T.double(), exact.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_paths_agree(dtype: torch.dtype, device: torch.device, request: pytest.FixtureRequest) -> None:
    tensors, labels = problem(37, 20, 150, dtype, device)
    plain = with_gradients(with_entropies, [t.cpu() for t in tensors], labels.cpu(), (True, True, True))
    request.getfixturevalue("kernels")
    fused = with_gradients(with_entropies, tensors, labels, (True, True, True))
    for one, other, size in zip(fused, plain, sizes(tensors, labels), strict=True):
        assert_within(one.to(dtype), other.to(dtype), size, factor=2.0)


@pytest.mark.parametrize("trains", [(True, False, False), (True, True, True)])
def test_opcheck(trains: tuple[bool, ...], path: str, device: torch.device) -> None:
    tensors, labels = problem(5, 4, 70, torch.float32, device)
    hidden, weight, bias = (t.requires_grad_(flag) for t, flag in zip(tensors, trains, strict=True))
    direction = path == "pytorch" and not trains[1]
    torch.library.opcheck(op._forward, (hidden, weight, labels, bias, not direction, direction))
    torch.library.opcheck(op._forward, (hidden, weight, labels, None, False, False))


@pytest.mark.parametrize("trains", [(True, False, False), (True, True, True)])
@pytest.mark.parametrize("entropies", [False, True])
def test_compiles_without_a_break(
    trains: tuple[bool, ...], entropies: bool, path: str, device: torch.device
) -> None:
    tensors, labels = problem(20, 12, 150, torch.float32, device)

    def values(*args: torch.Tensor) -> Any:
        found = selected_log_probs(*args, entropies=entropies)
        return found if isinstance(found, tuple) else (found, args[0].new_zeros(20))

    wanted = with_gradients(values, tensors, labels, trains)
    found = with_gradients(
        torch.compile(values, fullgraph=True, backend="aot_eager"), tensors, labels, trains
    )
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("trains", [(True, False, True), (True, True, True)])
def test_autocast_is_the_same_as_inputs_of_its_dtype(
    trains: tuple[bool, ...], path: str, device: torch.device
) -> None:
    tensors, labels = problem(20, 12, 150, torch.bfloat16, device)
    tensors[2] = tensors[2].float()

    def cast(*args: torch.Tensor) -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return selected_log_probs(*args, entropies=True)

    wanted = with_gradients(with_entropies, tensors, labels, trains)
    found = with_gradients(cast, [tensor.float() for tensor in tensors], labels, trains)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one.to(other.dtype), other)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_block_or_the_inputs(
    trains: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bodies of the ops themselves, since a mode does not look into an op."""
    (hidden, weight, _), labels = problem(200, 3, 500, dtype)
    given = (hidden, weight, labels, None)
    with Largest() as seen:
        found = blocks.forward(*given, trains, not trains)
        if trains:
            of = torch.ones(200)
            room = torch.empty_like(hidden), torch.empty_like(weight), weight.new_empty(0)
            blocks.backward(*given, found[2], found[1], of, of, [True, True, False], room)
    assert seen.elements == (weight.numel() if trains else blocks.ROWS * blocks.COLUMNS)
    with Largest() as seen:
        selected_log_probs_reference(*given)
    assert seen.elements == 200 * 500


def test_the_frozen_head_has_no_product_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    (hidden, weight, _), labels = problem(6, 4, 90, torch.float32)
    found = selected_log_probs(hidden.requires_grad_(), weight, labels)
    monkeypatch.setattr(blocks, "_Blocks", None)
    found.sum().backward()
    assert hidden.grad is not None


def test_without_gradients_nothing_is_made_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    (hidden, weight, _), labels = problem(6, 4, 90, torch.float32)
    expected = selected_log_probs(hidden.requires_grad_(), weight, labels)
    monkeypatch.setattr(blocks, "_add_product", None)
    with torch.no_grad():
        found = selected_log_probs(hidden, weight, labels)
    assert not found.requires_grad
    assert torch.equal(found, expected)


def test_rows_do_not_depend_on_each_other() -> None:
    (hidden, weight, bias), labels = problem(40, 12, 150, torch.float32)
    together = selected_log_probs(hidden, weight, labels, bias)
    alone = torch.cat(
        [selected_log_probs(hidden[k : k + 1], weight, labels[k : k + 1], bias) for k in range(40)]
    )
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "problem_"),
    [
        (lambda h, w, y, b: (h[0], w, y, b), "N x D, V x D and N, not"),
        (lambda h, w, y, b: (h[:, :3], w, y, b), "do not fit"),
        (lambda h, w, y, b: (h, w, y[:2], b), "do not fit"),
        (lambda h, w, y, b: (h, w[:0], y, b[:0]), "do not fit"),
        (lambda h, w, y, b: (h, w, y, b[:5]), "a number per row of the weight, 9, not"),
        (lambda h, w, y, b: (h, w, y.float(), b), "labels are integers, not torch.float32"),
        (lambda h, w, y, b: (h.int(), w.int(), y, b), "are floating, not torch.int32"),
    ],
)
def test_what_is_refused(change: Any, problem_: str) -> None:
    (hidden, weight, bias), labels = problem(4, 5, 9, torch.float32)
    with pytest.raises(ValueError, match=problem_):
        selected_log_probs(*change(hidden, weight, labels, bias))


def test_the_bounds_are_those_of_the_dtypes() -> None:
    """A logit that is off by a whole unit of its dtype is further off than the bound allows."""
    (hidden, weight, bias), labels = problem(37, 20, 150, torch.float32)
    exact = selected_log_probs_reference(hidden.double(), weight.double(), labels, bias.double())[0]
    size = sizes([hidden, weight, bias], labels)[0]
    with pytest.raises(AssertionError):
        assert_within((exact + 4 * BOUNDS[torch.float32] * size).float(), exact, size)
