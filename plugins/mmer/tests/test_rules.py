"""The masks: nearest in L1, nested, the same under scale; and the spec's toy figures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from graftwork.merge.masks import pack, unpack
from graftwork.merge.signs import disjoint, elect
from graftwork_kernels.masked_delta import pack_mask, unpack_mask
from graftwork_mmer.rules import ScaleSums, congruent, nearest, stored
from hypothesis import given, settings
from hypothesis import strategies as st

# Multiples of 1/8: sums and products are exact, ties happen.
eighths = st.integers(-16, 16).map(lambda value: value / 8)


def row(values: list[float]) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


vectors = st.integers(1, 10).flatmap(
    lambda count: st.tuples(*(st.lists(eighths, min_size=count, max_size=count) for _ in range(2)))
)
lams = st.sampled_from([0.2, 0.5, 0.8, 1.0, 1.5, 3.0])


@settings(max_examples=60, deadline=None)
@given(vectors)
def test_no_mask_is_nearer(pair: tuple[list[float], list[float]]) -> None:
    delta, merged = row(pair[0]), row(pair[1])
    mine = (nearest(delta, merged, 1) * merged - delta).abs().sum()
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(pair[0]))))
    best = (every * merged - delta).abs().sum(-1).min()
    assert mine == best
    assert mine <= min(delta.abs().sum(), (merged - delta).abs().sum())
    assert bool((nearest(delta, merged, 1) * delta * merged >= 0).all())


@settings(max_examples=60, deadline=None)
@given(vectors, lams, lams)
def test_masks_are_nested_and_scale_free(
    pair: tuple[list[float], list[float]], one: float, other: float
) -> None:
    delta, merged = row(pair[0]), row(pair[1])
    low, high = sorted((one, other))
    assert not bool((nearest(delta, merged, high) & ~nearest(delta, merged, low)).any())
    for rule in (nearest, congruent):
        assert torch.equal(rule(delta, merged, one), rule(delta / 4, merged / 4, one))
    there = merged != 0
    assert torch.equal(nearest(delta, merged, 1e-9), (delta != 0) & there)
    assert torch.equal(nearest(delta, merged, 1e9), (delta == merged) & there)


@settings(max_examples=60, deadline=None)
@given(vectors)
def test_congruence_at_half_is_nearest_at_one(pair: tuple[list[float], list[float]]) -> None:
    """Ties, |tau| = |u| / 2, keep nothing in both."""
    delta, merged = row(pair[0]), row(pair[1])
    assert torch.equal(nearest(delta, merged, 1.0), congruent(delta, merged, 0.5))


@pytest.mark.parametrize("lam", [0.2, 0.6, 1.0, 3.0])
def test_what_a_threshold_means(lam: float) -> None:
    """With r = |u| / |tau|: equal signs between 1 - 1/lam and 1 + 1/lam, opposite ones up to 1/lam - 1."""
    delta, merged = torch.randn(2, 1, 20000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ratio, same = merged.abs() / delta.abs(), merged * delta > 0
    within = (ratio > max(0.0, 1 - 1 / lam)) & (ratio < 1 + 1 / lam)
    assert torch.equal(nearest(delta, merged, lam), torch.where(same, within, ratio < 1 / lam - 1))


def test_small_numbers_have_signs() -> None:
    """Their product would be 0 in float32."""
    assert congruent(row([1e-30, -1e-30]), row([1e-30, 1e-30]), 0.5).tolist() == [[True, False]]
    assert not bool(nearest(row([1.0]), row([0.0]), 0.1).any())


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 576, 1536])
def test_bits_are_the_same_to_kernels_and_core(columns: int) -> None:
    mask = torch.rand(3, columns, generator=torch.Generator().manual_seed(columns)) < 0.4
    bits = pack(mask)
    assert torch.equal(unpack_mask(bits.words, columns), mask)
    assert torch.equal(pack_mask(mask), bits.words)
    assert torch.equal(unpack(bits.words, columns), mask)


@pytest.mark.parametrize(
    ("count", "keep", "density", "masked", "plain", "cosine"),
    [
        (3, 0.2, 0.201, 0.525, 1.18, 0.859),
        (3, 1.0, 0.517, 0.460, 1.02, 0.883),
        (2, 0.2, 0.201, 0.503, 0.862, 0.871),
    ],
)
def test_toy_figures(
    count: int, keep: float, density: float, masked: float, plain: float, cosine: float
) -> None:
    """Independent Laplace differences, TIES by the mean, lam 1: section 9 of the protocol, +-0.005.

    The cosine is that of what the mask keeps with the expert's difference.
    """
    draw = np.random.default_rng(3)
    deltas = torch.from_numpy(draw.laplace(size=(count, 1, 400_000)).astype(np.float32))
    sizes = deltas.abs().flatten(1)
    cuts = sizes.kthvalue(int(sizes.shape[1] * (1 - keep)) or 1, dim=1).values
    kept = torch.where(deltas.abs() >= cuts[:, None, None], deltas, 0.0) if keep < 1 else deltas
    merged = disjoint(kept, elect(kept), "mean")
    found = []
    for delta in deltas:
        mine = nearest(delta, merged, 1) * merged
        found.append(
            [
                float((mine != 0).float().mean()),
                float((mine - delta).abs().sum() / delta.abs().sum()),
                float((merged - delta).abs().sum() / delta.abs().sum()),
                float(torch.cosine_similarity(mine, delta)),
            ]
        )
    means = np.mean(found, axis=0)
    assert means[:2] == pytest.approx([density, masked], abs=0.005)
    assert means[2] == pytest.approx(plain, abs=0.01)
    assert means[3] == pytest.approx(cosine, abs=0.005)


def test_scales() -> None:
    delta, kept = row([1.0, -2.0, 3.0]), row([2.0, 0.0, 2.0])
    l2, l1, none = ScaleSums("l2"), ScaleSums("l1"), ScaleSums("l2")
    l2.add(delta, kept)
    l1.add(delta, kept)
    none.add(delta, torch.zeros_like(kept))
    assert l2.value == (2 + 6) / 8
    assert l1.value == 6 / 4
    assert none.value == 1


def test_rounding() -> None:
    values = row([1.00390625, 0.1])
    assert torch.equal(stored(values, torch.float32), values)
    assert torch.equal(stored(values, torch.bfloat16), values.bfloat16().float())
