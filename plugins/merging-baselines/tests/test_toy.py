"""Reference figures of a toy: Laplace differences, TIES by mean, TALL's rule at lam = 1 on the merged difference.

The figures were made with another implementation; they hold within 0.005 for any seed.
"""

from __future__ import annotations

import math

import pytest
import torch
from graftwork.merge.method import Piece
from graftwork.merge.select import largest
from graftwork.merge.signs import disjoint, elect

ENTRIES = 400_000
EXPECTED = {
    (3, 0.2): (0.201, 0.525, 1.18, 0.859),
    (3, 1.0): (0.517, 0.460, 1.02, 0.883),
    (2, 0.2): (0.201, 0.503, 0.862, 0.871),
}


@pytest.mark.parametrize(("experts", "keep"), EXPECTED)
def test_figures_of_independent_differences(experts: int, keep: float) -> None:
    torch.manual_seed(0)
    deltas = torch.distributions.Laplace(0.0, 1.0).sample((experts, 1, ENTRIES))
    piece = Piece("w", 0, slice(0, 1), tuple("abc"[:experts]), torch.zeros(1, ENTRIES), deltas)
    kept = deltas
    if keep < 1:
        cuts = largest(lambda: [piece], math.ceil(keep * ENTRIES), experts)
        kept = torch.stack([torch.where(c.keeps(piece, i), deltas[i], 0.0) for i, c in enumerate(cuts)])
    merged = disjoint(kept, elect(kept))
    found = []
    for delta in deltas:
        mask = (delta.abs() > (merged - delta).abs()) & (merged != 0)
        masked = torch.where(mask, merged, 0.0)
        size = delta.abs().sum()
        found.append(
            [
                mask.float().mean(),
                (masked - delta).abs().sum() / size,
                (merged - delta).abs().sum() / size,
                torch.nn.functional.cosine_similarity(masked, delta).squeeze(),
            ]
        )
    means = torch.tensor(found).mean(0).tolist()
    print(means)
    assert means == pytest.approx(EXPECTED[experts, keep], abs=0.005)
