"""Signs and what agrees with them, against the definitions in float64."""

from __future__ import annotations

import pytest
import torch
from graftwork.merge.signs import disjoint, elect, total

DELTAS = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(1))
DELTAS[DELTAS.abs() < 0.4] = 0
DELTAS[:, 0, 0] = torch.tensor([1.0, -1.0, 0.5, -0.5])


def reference(deltas: torch.Tensor, how: str) -> torch.Tensor:
    found = torch.zeros(deltas.shape[1:], dtype=torch.float64)
    for row in range(found.shape[0]):
        for column in range(found.shape[1]):
            values = deltas[:, row, column].double()
            sign = values.sum().sign()
            agree = [value for value in values if value * sign > 0]
            if agree:
                stacked = torch.stack(agree)
                found[row, column] = {
                    "mean": stacked.mean(),
                    "sum": stacked.sum(),
                    "max": sign * stacked.abs().max(),
                }[how]
    return found


@pytest.mark.parametrize("how", ["mean", "sum", "max"])
def test_what_agrees(how: str) -> None:
    found = disjoint(DELTAS, elect(DELTAS), how)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), reference(DELTAS, how), rtol=1e-6, atol=0)


def test_no_sign_where_the_sum_is_zero() -> None:
    assert elect(DELTAS)[0, 0] == 0
    assert disjoint(DELTAS, elect(DELTAS))[0, 0] == 0


def test_the_sum_is_taken_in_float64() -> None:
    deltas = torch.tensor([2.0**30, 1.0, -(2.0**30)]).view(3, 1, 1)
    assert total(deltas).item() == 1.0
    assert elect(deltas).item() == 1.0
