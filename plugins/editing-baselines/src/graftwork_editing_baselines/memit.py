"""MEMIT (Meng et al., ICLR 2023): many facts, spread over the MLPs of a band of layers.

    dW = R K^T (lam C + K K^T)^-1

with R as :mod:`.spread` has it. After the authors' code (kmeng01/memit), rewritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from graftwork.console import Console
from graftwork.edit.edits import EditSet
from graftwork.edit.plugin import EditPlugin
from graftwork.edit.requests import Request
from graftwork.edit.sites import Site
from graftwork.edit.solve import RIDGE, Update, solve_update
from graftwork.edit.statistics import Provider
from pydantic import Field

from graftwork_editing_baselines.spread import SpreadOptions, spread_edit


class MemitOptions(SpreadOptions):
    """Options of MEMIT."""

    lam: float = Field(
        15000.0, gt=0, description="weight of the second moments; a gain below 0.5 says too large"
    )
    ridge: float = Field(RIDGE, ge=0, description="share of the mean of lam C that is added to its diagonal")


class MemitEditor:
    """MEMIT as an editor."""

    name = "memit"
    uses_statistics = True

    def __init__(self, options: MemitOptions) -> None:
        self.options = options

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

        def solve(site: Site, residuals: torch.Tensor, now: torch.Tensor) -> Update:
            return solve_update(residuals, now, statistics.factor(site, options.lam, options.ridge))

        return spread_edit(
            self.name, model, tokenizer, requests, statistics, options, solve, console=console, seed=seed
        )


class Memit(EditPlugin):
    """MEMIT as a plugin."""

    name = "memit"
    Options = MemitOptions

    @classmethod
    def editor(cls, options: MemitOptions) -> MemitEditor:
        return MemitEditor(options)
