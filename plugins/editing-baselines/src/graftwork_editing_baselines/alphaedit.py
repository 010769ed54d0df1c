"""AlphaEdit (Fang et al., ICLR 2025): MEMIT's residuals, written where the keys of the corpus have next to no energy.

    dW = R (P K)^T (P (K K^T + K_p K_p^T) P + L2 I)^-1,   dW P = dW

P projects on the smallest eigenvectors of C, K_p are the keys of edits that the model holds already. The reference
solves the transpose of an equal system that is not symmetric. A bound on eigenvalues does not transfer between models,
so P keeps the directions that hold a share of the trace: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from graftwork.console import Console
from graftwork.edit.edits import EditSet
from graftwork.edit.errors import StatsError
from graftwork.edit.plugin import EditPlugin
from graftwork.edit.requests import Request
from graftwork.edit.sites import Site
from graftwork.edit.solve import Update
from graftwork.edit.statistics import Provider
from pydantic import Field

from graftwork_editing_baselines.spread import SpreadOptions, spread_edit


class AlphaEditOptions(SpreadOptions):
    """Options of AlphaEdit."""

    rho: float = Field(
        0.02, gt=0, lt=1, description="share of the trace of C that the kept directions hold together"
    )
    l2: float = Field(1.0, gt=0, description="added to the diagonal of the system")


def null_basis(moment: torch.Tensor, rho: float) -> torch.Tensor:
    """Return an orthonormal basis (d x m) of the smallest eigenvectors of C that hold at most ``rho`` of its trace.

    Raises:
        StatsError: even the smallest holds more: the keys use all directions alike.
    """
    values, vectors = torch.linalg.eigh(moment)
    held = values.clamp(min=0).cumsum(0)
    count = int((held <= rho * held[-1]).sum())
    if not count:
        raise StatsError(
            f"no direction of the keys holds as little as {rho:g} of their energy; set plugins.alphaedit.rho higher"
        )
    return vectors[:, :count]


def null_space_update(
    residuals: torch.Tensor, now: torch.Tensor, earlier: torch.Tensor | None, basis: torch.Tensor, l2: float
) -> Update:
    """Return the update for residuals (h x n) at keys ``now`` (d x n), inside the span of ``basis`` (d x m).

    In coordinates of the basis B the system is m x m: dW = R K^T B (B^T M B + l2 I)^-1 B^T with M = K K^T + K_p K_p^T.
    """
    inside = basis.T @ now
    system = inside @ inside.T
    if earlier is not None:
        old = basis.T @ earlier
        system += old @ old.T
    system.diagonal().add_(l2)
    lower = torch.linalg.cholesky(system)
    right = basis @ torch.cholesky_solve(inside, lower)
    diagonal = lower.diagonal()
    condition = float((diagonal.max() / diagonal.min()) ** 2)
    return Update(residuals, right, (now * right).sum(0), condition)


class AlphaEditEditor:
    """AlphaEdit as an editor; it remembers the keys of its earlier edits, by the weights that hold them."""

    name = "alphaedit"
    uses_statistics = True

    def __init__(self, options: AlphaEditOptions) -> None:
        self.options = options
        # After which weight (digest) stand which keys: nothing is carried over to another model, or past an undo.
        self._keys: dict[tuple[str, str], torch.Tensor] = {}

    def edit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[Request],
        statistics: Provider,
        *,
        console: Console,
        seed: int,
    ) -> EditSet:
        options = self.options
        mine: dict[str, torch.Tensor] = {}
        kept: dict[str, float] = {}

        def solve(site: Site, residuals: torch.Tensor, now: torch.Tensor) -> Update:
            basis = null_basis(statistics.moment(site), options.rho)
            kept[site.name] = basis.shape[1] / site.d
            earlier = self._keys.get((site.name, site.digest()))
            mine[site.name] = now if earlier is None else torch.cat([earlier, now], 1)
            return null_space_update(residuals, now, earlier, basis, options.l2)

        edits = spread_edit(
            self.name,
            model,
            tokenizer,
            requests,
            statistics,
            options,
            solve,
            console=console,
            seed=seed,
            told={"kept": kept},
        )
        for name, values in mine.items():
            self._keys[name, edits.parts[0].after[name]] = values
        return edits


class AlphaEdit(EditPlugin):
    """AlphaEdit as a plugin."""

    name = "alphaedit"
    Options = AlphaEditOptions

    @classmethod
    def editor(cls, options: AlphaEditOptions) -> AlphaEditEditor:
        return AlphaEditEditor(options)
