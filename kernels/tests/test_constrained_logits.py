"""COIECD's constrained logits against the formulas in float64, on both paths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from graftwork_kernels import constrained_logits as op
from graftwork_kernels.constrained_logits import (
    constrained_logits,
    constrained_logits_reference,
    violating,
)
from graftwork_kernels.testing import assert_within, relative_error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, V: no multiple of a block, one of everything, more than a part, no rows.
SHAPES = [(2, 300), (1, 1), (2, 2), (1, 129), (0, 7)]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"alpha": 0.5, "ratio": 16.0, "swapped": True},
    {"alpha": 0.0, "ratio": 1.0},
    {"alpha": 0.3, "ratio": math.inf},
    {"gamma": 2.0},
    {"alpha": 2.0, "gamma": 0.0, "swapped": True},
    {"gamma": math.inf},
]


@pytest.fixture(params=["pytorch", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton":
        request.getfixturevalue("kernels")
        from graftwork_kernels import constrained_logits_triton as kernels

        # Two blocks in the only part of a row, of which the second is smaller: few programs, for they take long.
        monkeypatch.setattr(kernels, "BLOCK", 256)
        monkeypatch.setattr(kernels, "PART", 512)
    return request.param


@pytest.fixture
def many_parts(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut rows into several parts of two blocks, the last ones smaller."""
    if path == "triton":
        from graftwork_kernels import constrained_logits_triton as kernels

        monkeypatch.setattr(kernels, "BLOCK", 128)
        monkeypatch.setattr(kernels, "PART", 256)


def streams(
    rows: int,
    words: int,
    dtype: torch.dtype,
    device: Any = "cpu",
    *,
    scale: float = 3.0,
    ruled_out: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + words)
    both = scale * torch.randn(2, rows, words, generator=generator, dtype=torch.float64)
    gone = torch.rand(both.shape, generator=generator) < ruled_out
    gone[..., 0] = False
    both[gone] = -torch.inf
    return both[0].to(device, dtype), both[1].to(device, dtype)


def assert_like_the_reference(main: torch.Tensor, contrast: torch.Tensor, **setting: Any) -> None:
    """Compare all fields; scores only where rounding does not decide on which side of a bound a token is."""
    found = constrained_logits(main, contrast, **setting)
    wanted = constrained_logits_reference(main.double(), contrast.double(), **setting)
    assert found.scores.dtype == main.dtype
    finite = [
        z.double().masked_fill(z.isinf(), 0.0).abs().amax(1) + math.log(main.shape[1])
        for z in (main, contrast)
    ]
    size = finite[0] + finite[1] + (setting.get("gamma") or 0.0)
    for name in ("main_normaliser", "contrast_normaliser", "entropy", "above", "below"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert one.dtype == torch.float32
        assert_within(one, other, size if size.isfinite().all() else None)
    edge = 1e-4
    near = torch.zeros_like(main, dtype=torch.bool)
    for bound in (wanted.above, wanted.below):
        near |= (main.double() - bound[:, None]).abs() < edge
    terms = (setting.get("alpha", 1.0) + 1) * (2 * size[:, None]) + main.double().masked_fill(
        main.isinf(), 0.0
    ).abs()
    kept = torch.where(near, wanted.scores.to(main.dtype), found.scores)
    assert_within(kept, wanted.scores, terms)
    assert near.double().mean() < 0.05 or main.numel() < 10


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("setting", SETTINGS[1:5:3])
def test_all_fields(
    shape: tuple[int, int], dtype: torch.dtype, setting: dict[str, Any], path: str, device: torch.device
) -> None:
    assert_like_the_reference(*streams(*shape, dtype, device), **setting)


@pytest.mark.parametrize("setting", SETTINGS)
def test_all_settings_and_what_is_ruled_out(setting: dict[str, Any], path: str, device: torch.device) -> None:
    main, contrast = streams(2, 300, torch.float32, device, ruled_out=0.4)
    main[0, :270] = contrast[1, :270] = -torch.inf
    main[0, 280] = main[1, 280] = 1.0
    assert_like_the_reference(main, contrast, **setting)
    scores = constrained_logits(main, contrast, **setting).scores
    assert scores[main == -torch.inf].isneginf().all()
    assert not scores.isnan().any()
    assert not (scores == torch.inf).any()


@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_equal_logits_and_large_ones(scale: float, path: str, device: torch.device) -> None:
    main, contrast = streams(3, 300, torch.float32, device, scale=scale)
    if scale:
        assert_like_the_reference(main, contrast)
    else:
        found = constrained_logits(main, contrast)
        assert torch.equal(found.scores, main)
        torch.testing.assert_close(found.entropy, torch.full((3,), math.log(300), device=device))


@pytest.mark.usefixtures("many_parts")
def test_one_token_above_is_none_and_two_of_a_size_are_two(path: str, device: torch.device) -> None:
    main = torch.zeros(4, 400, device=device)
    main[0, 300] = 9.0
    main[1, 30] = main[1, 301] = 9.0
    # A second one beyond the bound, in the same lane of another block and in the same block.
    main[2, 5], main[2, 5 + 128] = 9.0, 8.0
    main[3, 5], main[3, 6] = 8.0, 9.0
    found = constrained_logits(main, torch.zeros_like(main), ratio=4.0)
    likely, unlikely = violating(main, found.above, found.below, banded=False)
    assert found.above.isinf().tolist() == [True, False, False, False]
    assert likely.sum(1).tolist() == [0, 2, 2, 2]
    assert unlikely.sum(1).tolist() == [399, 398, 398, 398]


def test_bounds_are_strict(path: str, device: torch.device) -> None:
    step = math.log(4.0)
    main = torch.tensor([[0.0, -0.5, -step]], device=device)
    found = constrained_logits(main, torch.zeros_like(main))
    likely, unlikely = violating(main, found.above, found.below, banded=False)
    assert likely.tolist() == [[True, True, False]]
    assert unlikely.tolist() == [[False, True, True]]


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_neutral_settings_bit_for_bit(dtype: torch.dtype, path: str, device: torch.device) -> None:
    main, contrast = streams(3, 300, dtype, device, ruled_out=0.2)
    assert torch.equal(constrained_logits(main, contrast, alpha=1.0, ratio=1.0).scores, main)
    assert torch.equal(constrained_logits(main, contrast, gamma=math.inf).scores, main)
    assert torch.equal(constrained_logits(main, main.clone(), alpha=0.7).scores, main)


def test_rows_that_are_no_distribution_show_in_the_normalisers(path: str, device: torch.device) -> None:
    main, contrast = streams(4, 300, torch.float32, device)
    main[1] = -torch.inf
    main[2, 299] = torch.inf
    contrast[3, 17] = torch.nan
    found = constrained_logits(main, contrast)
    assert found.main_normaliser.isfinite().tolist() == [True, False, False, True]
    assert found.contrast_normaliser.isfinite().tolist() == [True, True, True, False]
    assert found.scores[0].isfinite().all()


def test_what_is_not_contiguous(path: str, device: torch.device) -> None:
    main, contrast = streams(3, 300, torch.float32, device)
    spread = main.T.contiguous().T, torch.stack([contrast, contrast], 2)[..., 1]
    assert not any(one.is_contiguous() for one in spread)
    for one, other in zip(constrained_logits(*spread), constrained_logits(main, contrast), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("setting", SETTINGS[1:5:3])
def test_paths_agree(setting: dict[str, Any], device: torch.device, request: pytest.FixtureRequest) -> None:
    main, contrast = streams(3, 300, torch.float32, device, ruled_out=0.1)
    plain = constrained_logits(main.cpu(), contrast.cpu(), **setting)
    request.getfixturevalue("kernels")
    fused = constrained_logits(main, contrast, **setting)
    for one, other in zip(fused, plain, strict=True):
        assert relative_error(one, other) < 1e-5


def test_opcheck(path: str, device: torch.device) -> None:
    main, contrast = streams(1, 60, torch.float32, device)
    torch.library.opcheck(op._constrained, (main, contrast, 1.0, 1.4, True, False))


def test_compiles_without_a_break_and_does_not_mind_autocast(path: str, device: torch.device) -> None:
    main, contrast = streams(2, 300, torch.float32, device)
    wanted = constrained_logits(main, contrast)
    found = torch.compile(constrained_logits, fullgraph=True, backend="aot_eager")(main, contrast)
    with torch.autocast(device.type, torch.bfloat16):
        cast = constrained_logits(main, contrast)
    for one, other, another in zip(found, wanted, cast, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(another, other)


def test_nothing_is_changed_in_place(path: str, device: torch.device) -> None:
    main, contrast = streams(2, 300, torch.float32, device, ruled_out=0.1)
    before = main.clone(), contrast.clone()
    constrained_logits(main, contrast)
    assert torch.equal(main, before[0])
    assert torch.equal(contrast, before[1])


@pytest.mark.parametrize(
    ("main", "contrast", "setting", "problem"),
    [
        ((2, 3), (2, 4), {}, "B x V of equal shape"),
        ((3,), (3,), {}, "B x V of equal shape"),
        ((2, 0), (2, 0), {}, "V > 0"),
        ((2, 3), (2, 3), {"alpha": -0.1}, "not alpha -0.1"),
        ((2, 3), (2, 3), {"alpha": math.nan}, "not alpha nan"),
        ((2, 3), (2, 3), {"ratio": 0.5}, "ratio 0.5"),
        ((2, 3), (2, 3), {"gamma": -1.0}, "gamma -1.0"),
    ],
)
def test_what_is_refused(main: Any, contrast: Any, setting: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        constrained_logits(torch.zeros(main), torch.zeros(contrast), **setting)
    with pytest.raises(ValueError, match="of one floating dtype"):
        constrained_logits(torch.zeros(2, 3), torch.zeros(2, 3).half())
