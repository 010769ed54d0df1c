"""Equation (4) and the router's penalty, against float64 by hand."""

from __future__ import annotations

import math

import pytest
import torch
from graftwork_sparta import branch_overlap, component_overlap, grow
from graftwork_sparta.losses import cosine_overlap
from graftwork_sparta.model import layers_of, routers_of


def test_the_ends_of_the_scale() -> None:
    rows = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    assert cosine_overlap(rows[:3], rows[3:]).item() == pytest.approx(0, abs=1e-28)
    row = torch.randn(1, 8, dtype=torch.float64)
    assert cosine_overlap(row, -3 * row).item() == pytest.approx(1, abs=1e-12)


def test_overlap_by_hand_and_its_invariance_to_row_lengths() -> None:
    left, right = torch.randn(2, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    total = 0.0
    for a in left.tolist():
        for b in right.tolist():
            inner = math.fsum(x * y for x, y in zip(a, b, strict=True))
            total += inner**2 / (math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
    value = cosine_overlap(left, right)
    assert value.item() == pytest.approx(total / 6, rel=1e-12)
    scaled = cosine_overlap(left * torch.tensor([[100.0], [0.01]]), right * 5)
    assert scaled.item() == pytest.approx(value.item(), rel=1e-12)
    assert cosine_overlap(left.float(), right.float()).item() == pytest.approx(value.item(), rel=1e-5)
    assert cosine_overlap(left.bfloat16(), right.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("orth", ["input", "output", "both"])
def test_the_term_is_the_mean_over_layers(adapt, orth) -> None:
    adapted = adapt()
    inputs, outputs = [], []
    for layer in layers_of(adapted):
        inputs.append(
            cosine_overlap(
                layer.sparta_shared_A["default"].double(), layer.sparta_specific_A["default"].double()
            )
        )
        outputs.append(
            cosine_overlap(
                layer.sparta_shared_B["default"].double().T, layer.sparta_specific_B["default"].double().T
            )
        )
    chosen = {"input": inputs, "output": outputs, "both": inputs + outputs}[orth]
    expected = torch.stack(chosen).mean().item()
    assert 0 < expected < 1
    assert branch_overlap(adapted, orth).item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_finite_where_b_is_zero(adapt) -> None:
    adapted = adapt(scrambled=False)
    branch_overlap(adapted, "both").backward()
    moved = 0
    for name, parameter in adapted.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name
            moved += int(parameter.grad.abs().sum() > 0)
    assert moved > 0


def test_the_term_pulls_the_branches_apart(adapt) -> None:
    adapted = adapt(router="off")
    start = branch_overlap(adapted).item()
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        value = branch_overlap(adapted)
        value.backward()
        optimizer.step()
    assert branch_overlap(adapted).item() < start / 10


def test_a_lone_branch_overlaps_with_nothing(adapt) -> None:
    assert branch_overlap(adapt(rank_shared=0, router="off")).item() == 0
    assert component_overlap(adapt(router="off")).item() == 0


@pytest.mark.parametrize("router", ["prompt", "lineage"])
def test_component_penalty_by_hand(adapt, scramble, router) -> None:
    adapted = adapt(router=router, model={"num_hidden_layers": 4})
    assert component_overlap(adapt(router=router, scrambled=False)).item() == pytest.approx(0, abs=1e-10)
    grow(adapted, torch.Generator().manual_seed(1))
    scramble(adapted)
    values = []
    for part in routers_of(adapted):
        matrices = [
            (part.sparta_old_A["default"], part.sparta_router_A["default"]),
            (part.sparta_old_K["default"], part.sparta_router_K["default"]),
        ]
        if router == "lineage":
            matrices.append((part.sparta_old_w["default"], part.sparta_router_w["default"]))
        for old, new in matrices:
            for branch in range(2):
                rows = torch.cat([old[branch], new[branch]]).double()
                values.append(((rows @ rows.T - torch.eye(6).double()) ** 2).mean())
    assert len(routers_of(adapted)) == 2
    assert component_overlap(adapted).item() == pytest.approx(torch.stack(values).mean().item(), rel=1e-5)
    component_overlap(adapted).backward()
    assert routers_of(adapted)[0].sparta_router_A["default"].grad.abs().sum() > 0
