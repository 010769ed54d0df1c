"""TIES in one pass: bit for bit the definition, on every path, whole and in parts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graftwork_kernels.dispatch import INTERPRETED, interpreting
from graftwork_kernels.testing import assert_within
from graftwork_kernels.ties_merge import HOWS, ties_merge, ties_merge_reference
from hypothesis import given, settings
from hypothesis import strategies as st

Path = Callable[[], contextlib.AbstractContextManager[None]]


@pytest.fixture(params=["pytorch", "kernel"])
def path(request: pytest.FixtureRequest) -> Path:
    """Both paths; on a GPU the kernel only, as the PyTorch path is not taken there."""
    if request.param == "kernel":
        return interpreting if INTERPRETED else contextlib.nullcontext
    if not INTERPRETED and torch.cuda.is_available():
        pytest.skip("a GPU takes the kernel")
    return contextlib.nullcontext


def drawn(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    source = torch.Generator().manual_seed(sum(shape))
    # Sixteenths in some places: sums cancel there, and sizes are equal.
    fine, coarse = torch.randn(2, *shape, generator=source)
    coarse = (coarse * 4).round() / 16
    return torch.where(torch.rand(shape, generator=source) < 0.4, coarse, fine).to(device, dtype)


def cuts(deltas: torch.Tensor, keep: float) -> tuple[list[float], list[int]]:
    """Return thresholds and ends that keep exactly ``ceil(keep P)`` entries of each vector."""
    values, ends = [], []
    for vector in deltas.flatten(1).float().cpu():
        wanted = max(1, int(keep * len(vector)))
        value = vector.abs().sort(descending=True).values[wanted - 1]
        rest = wanted - int((vector.abs() > value).sum())
        ends.append(int((vector.abs() == value).nonzero()[rest - 1]) + 1)
        values.append(float(value))
    return values, ends


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (2, 5, 33), (4, 0), (18, 130), (2, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_is_the_definition(
    how: Any, shape: tuple[int, ...], dtype: torch.dtype, path: Path, device: torch.device
) -> None:
    deltas = drawn(device, *shape, dtype=dtype)
    limits: list[dict[str, Any]] = [{}]
    if deltas.numel():
        values, ends = cuts(deltas, 0.3)
        limits += [{"thresholds": values}, {"thresholds": values, "ends": ends}]
    for limit in limits:
        with path():
            found = ties_merge(deltas, how=how, **limit)
        wanted = ties_merge_reference(deltas, how=how, **limit)
        assert found.dtype == dtype
        assert found.shape == shape[1:]
        if dtype == torch.bfloat16 and INTERPRETED and path is interpreting:
            assert_within(found, ties_merge_reference(deltas.double(), how=how, **limit))  # It truncates.
            assert torch.equal(found == 0, wanted == 0)
        else:
            assert torch.equal(found, wanted)
            assert not bool((found.signbit() & (found == 0)).any())


def test_ties_keep_the_first(path: Path, device: torch.device) -> None:
    deltas = torch.tensor([[1.0, -1.0, 2.0, 1.0, 0.5]], device=device)
    with path():
        assert ties_merge(deltas, [1.0], [2]).tolist() == [1, -1, 2, 0, 0]
        assert ties_merge(deltas, [1.0], [0]).tolist() == [0, 0, 2, 0, 0]
        assert ties_merge(deltas, [1.0], [-3]).tolist() == [0, 0, 2, 0, 0]
        assert ties_merge(deltas, [1.0], [99]).tolist() == [1, -1, 2, 1, 0]
        assert ties_merge(deltas, [1.0]).tolist() == [1, -1, 2, 1, 0]


def test_what_has_the_sign_is_merged(path: Path, device: torch.device) -> None:
    deltas = torch.tensor(
        [[1.0, 1.0, 0.0, 0.1], [3.0, -4.0, 0.0, 0.2], [-1.0, 1.0, 0.0, -0.3]], device=device
    )
    with path():
        assert ties_merge(deltas[:, :3], how="mean").tolist() == [2, -4, 0]
        assert ties_merge(deltas[:, :3], how="sum").tolist() == [4, -4, 0]
        assert ties_merge(deltas[:, :3], how="max").tolist() == [3, -4, 0]
        # Summed in float32 these cancel; in float64 the last one is seen to be larger.
        assert float(ties_merge(deltas[:, 3:])) == float(deltas[2, 3])
        opposite = torch.stack([deltas[0], -deltas[0]])
        assert not bool(ties_merge(opposite).any())


def test_sums_are_in_float64(path: Path, device: torch.device) -> None:
    """In float32 the first three would sum to 0, and the sign would be lost."""
    deltas = torch.tensor([[1e8], [1.0], [-1e8]], device=device)
    with path():
        assert float(ties_merge(deltas, how="sum")) == 1e8
        assert float(ties_merge(-deltas, how="sum")) == -1e8


def test_extremes(path: Path, device: torch.device) -> None:
    deltas = torch.tensor([[3e38, 1e-45, torch.inf, 0.0], [3e38, 1e-45, 1.0, -0.0]], device=device)
    with path():
        assert torch.equal(ties_merge(deltas), torch.tensor([3e38, 1e-45, torch.inf, 0.0], device=device))
        assert ties_merge(deltas, how="sum")[0] == torch.inf
        # All is trimmed.
        assert not bool(ties_merge(deltas[:, :2], [torch.inf, torch.inf]).any())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.sampled_from(HOWS), st.integers(0, 60))
def test_parts_are_the_whole(entries: int, count: int, how: Any, place: int) -> None:
    deltas = drawn(torch.device("cpu"), count, entries)
    values, ends = cuts(deltas, 0.5)
    whole = ties_merge(deltas, values, ends, how)
    place = min(place, entries)
    parts = [
        ties_merge(deltas[:, part], values, [end - part.start for end in ends], how)
        for part in (slice(0, place), slice(place, entries))
    ]
    assert torch.equal(torch.cat(parts), whole)
    kept = torch.cat(
        [ties_merge(deltas[i : i + 1], values[i : i + 1], ends[i : i + 1])[None] for i in range(count)]
    )
    sizes = drawn(torch.device("cpu"), count, entries)
    assert ((kept != 0) | (sizes == 0)).sum(1).min() >= max(1, int(0.5 * entries))


def test_not_contiguous_and_without_gradient(path: Path, device: torch.device) -> None:
    deltas = drawn(device, 6, 40, 3).requires_grad_()
    part = deltas.transpose(1, 2)[::2, :, ::3]
    with path():
        found = ties_merge(part)
    assert torch.equal(found, ties_merge_reference(part.contiguous()))
    assert not found.requires_grad


def test_op_is_whole_and_compiles(path: Path, device: torch.device) -> None:
    deltas = drawn(device, 3, 70)
    values, ends = cuts(deltas, 0.4)
    with path():
        torch.library.opcheck(torch.ops.graftwork.ties_merge.default, (deltas, values, ends, "mean"))
        expected = ties_merge(deltas, values, ends)
        whole = torch.compile(lambda one: ties_merge(one, values, ends), fullgraph=True, backend="aot_eager")
        assert torch.equal(whole(deltas), expected)
        with torch.autocast(device.type, torch.bfloat16):
            assert torch.equal(ties_merge(deltas, values, ends), expected)


def test_what_is_refused() -> None:
    deltas: Any = torch.ones(2, 3)
    for call, sentence in [
        (lambda: ties_merge(deltas[0]), "N x entries"),
        (lambda: ties_merge(deltas.long()), "float dtype"),
        (lambda: ties_merge(deltas[:0]), "N x entries"),
        (lambda: ties_merge(deltas, how="median"), "not by 'median'"),  # type: ignore[arg-type]
        (lambda: ties_merge(deltas, [1.0]), "2 vectors and 1 thresholds"),
        (lambda: ties_merge(deltas, [1.0, 1.0], [1]), "2 vectors and 1 ends"),
        (lambda: ties_merge(deltas, None, [1, 1]), "there are no thresholds"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            call()
