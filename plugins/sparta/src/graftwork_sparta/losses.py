"""The penalties of SpaRTA: orthogonal branches, orthonormal router components."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from graftwork_sparta.model import active_adapter, layers_of, routers_of


def cosine_overlap(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the mean squared cosine between rows of ``left`` (m x d) and ``right`` (n x d), in [0, 1].

    Rows of length 0 overlap with nothing, and their gradient is 0 rather than NaN.
    """
    left, right = _unit(left), _unit(right)
    return (left @ right.T).square().mean()


def branch_overlap(
    model: nn.Module, orth: Literal["input", "output", "both"] = "input", adapter: str | None = None
) -> torch.Tensor:
    """Return L_orth: the mean over layers of the overlap of both branches' directions (ours).

    ``input`` compares rows of A, ``output`` columns of B, ``both`` averages the two.
    """
    name = adapter or active_adapter(model)
    values = []
    for layer in layers_of(model, name):
        if name not in layer.sparta_shared_A or name not in layer.sparta_specific_A:
            continue
        if orth in ("input", "both"):
            values.append(cosine_overlap(layer.sparta_shared_A[name], layer.specific_a(name)))
        if orth in ("output", "both"):
            values.append(cosine_overlap(layer.sparta_shared_B[name].T, layer.sparta_specific_B[name].T))
    if not values:
        return torch.zeros((), device=next(model.parameters()).device)
    return torch.stack(values).mean()


def component_overlap(model: nn.Module, adapter: str | None = None) -> torch.Tensor:
    """Return L_comp: the mean over blocks, branches and matrices of mean((X X^T - I)^2) (lineage code).

    X holds the rows of all tasks; those of earlier tasks do not train. The matrices are A and K, and W with
    the lineage router.
    """
    name = adapter or active_adapter(model)
    values = []
    for router in routers_of(model, name):
        pairs = [
            (router.sparta_old_A[name], router.sparta_router_A[name]),
            (router.sparta_old_K[name], router.sparta_router_K[name]),
        ]
        if router.configs[name].router == "lineage":
            pairs.append((router.sparta_old_w[name], router.sparta_router_w[name]))
        for old, new in pairs:
            rows = torch.cat([old, new], 1).float()
            gram = rows @ rows.mT
            values.append((gram - torch.eye(gram.shape[-1], device=gram.device)).square().mean())
    if not values:
        return torch.zeros((), device=next(model.parameters()).device)
    return torch.stack(values).mean()


def _unit(rows: torch.Tensor) -> torch.Tensor:
    rows = rows if rows.dtype == torch.float64 else rows.float()
    squares = rows.square().sum(-1, keepdim=True)
    # rsqrt at 0 would give an infinite gradient; the clamp makes it 0.
    return rows * squares.clamp_min(1e-24).rsqrt()
