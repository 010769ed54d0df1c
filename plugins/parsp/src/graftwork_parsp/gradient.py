"""The same constraints on full weights (mode: gradient), where no parametrisation can hold them.

Projected gradients alone are not enough: Adam divides them element by element, which leaves the subspace, and
weight decay moves every row. So the weights themselves are put back after every step:

    W[C] <- W_start[C] + (W[C] - W_start[C]) P          W[not C] <- W_start[not C], byte for byte

W_start is the weight at the task's start; against the weight before the step the result is the same, but rounding
would add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from graftwork_kernels.region_update import fold_rows
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftwork_parsp.neurons import Mlp, base_of
from graftwork_parsp.nullspace import Basis
from graftwork_parsp.regions import Region


class ProjectedRows:
    """The input projections of ``mlps`` as full weights that move only inside their regions."""

    def __init__(
        self,
        model: nn.Module,
        mlps: Sequence[Mlp],
        regions: Mapping[str, Region],
        bases: Mapping[str, Basis],
    ) -> None:
        base = base_of(model)
        self.parts: list[tuple[nn.Parameter, bool, torch.Tensor, torch.Tensor, Basis]] = []
        for mlp in mlps:
            for key in mlp.ins:
                layer = base.get_submodule(key)
                weight = layer.weight
                transposed = isinstance(layer, Conv1D)
                basis = bases.get(mlp.name, Basis.empty(mlp.inputs))
                basis = Basis(basis.matrix.to(weight.device), basis.k, basis.complement)
                core = regions[mlp.name].core.to(weight.device)
                self.parts.append((weight, transposed, weight.detach().clone(), core, basis))
        self.trained = {id(weight) for weight, *_ in self.parts}

    def freeze_others(self, model: nn.Module) -> None:
        """Leave only the projections that have rows to train trainable."""
        empty = {id(weight) for weight, _, _, core, _ in self.parts if not len(core)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in self.trained - empty)

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        """Keep the part of every gradient that lies inside the region and the null space."""
        for weight, transposed, _, core, basis in self.parts:
            if weight.grad is not None:
                gradient = weight.grad.T if transposed else weight.grad
                rows = _project(gradient[core], basis)
                gradient.zero_()
                gradient[core] = rows.to(gradient.dtype)

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        """Put the weights back to where the constraints hold."""
        for weight, transposed, start, core, basis in self.parts:
            own, kept = (weight.data.T, start.T) if transposed else (weight.data, start)
            before = kept[core]
            if basis.k:
                wide = torch.promote_types(own.dtype, torch.float32)
                moved = before.to(wide) + _project(own[core].to(wide) - before.to(wide), basis)
            else:
                moved = own[core]
            own.copy_(kept)
            own[core] = moved.to(own.dtype)


def _project(rows: torch.Tensor, basis: Basis) -> torch.Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    return fold_rows(rows.to(wide), basis.matrix.to(wide), basis.complement)
