"""Low rank: every linear becomes two thin ones. SVD, ASVD and SVD-LLM (W), which differ in how error is measured.

ASVD: Yuan et al., "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models", 2023
(arXiv 2312.05821). SVD-LLM: Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language
Model Compression", ICLR 2025 (arXiv 2403.07378).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from graftwork import UserError, WeightTransform, hookimpl
from graftwork.transform.feedback import output_error
from graftwork.transform.lowrank import rank_for, truncated, whitener
from graftwork.transform.modules import Factored
from pydantic import BaseModel, ConfigDict, Field

from graftwork_compression_baselines.order import WeightPlugin
from graftwork_compression_baselines.surroundings import moments, readers, shared

if TYPE_CHECKING:
    from graftwork.run import Run
    from graftwork.transform.block import Block

LEAST_SCALE = 1e-6
"""Of an input that was always zero (ASVD's code)."""


class SvdOptions(BaseModel):
    """Options of low rank."""

    model_config = ConfigDict(extra="forbid")

    ratio: float = Field(0.8, gt=0, le=1, description="numbers in both factors per number in the weight")
    whiten: Literal["none", "asvd", "cholesky"] = Field(
        "cholesky",
        description="metric of the error: none (plain SVD), asvd (inputs scaled by their mean size), cholesky "
        "(outputs; SVD-LLM)",
    )
    alpha: float = Field(0.5, ge=0, le=1, description="asvd: exponent of the mean size of an input")
    damp: float = Field(
        0.0, ge=0, description="cholesky: share of the mean of the moments' diagonal that is added to it"
    )


def factors(
    weight: torch.Tensor, rank: int, metric: torch.Tensor | None, name: str
) -> tuple[torch.Tensor, ...]:
    """Return ``U S^(1/2)`` (out x r) and ``S^(1/2) V`` (r x in), float64, the best of that rank in ``metric``."""
    left, values, right = truncated(weight, rank, metric, name)
    root = values.sqrt()
    return left * root, root[:, None] * right


class Svd(WeightPlugin):
    """Two thin linears for one."""

    name = "svd"
    Options = SvdOptions

    def __init__(self, options: SvdOptions) -> None:
        self.options = options

    @hookimpl
    def weight_transforms(self, run: Run) -> Sequence[WeightTransform]:
        figures = {
            "low_rank": "rank of a linear",
            "low_rank_error": "squared error relative to the square: of the weight with none and asvd, of outputs with "
            "cholesky",
        }
        needs = "none" if self.options.whiten == "none" else "activations"
        return [WeightTransform("svd", self.transform, needs=needs, factors=True, figures=figures)]

    def transform(self, block: Block) -> None:
        """Factorise the linears of one layer; the inputs of all are those before any is changed."""
        linears = block.linears()
        for name in linears:
            parent = name.rpartition(".")[0]
            if parent and isinstance(block.get(parent), Factored):
                raise UserError(
                    f"'{block.name}.{parent}' is factorised already; leave one of the plugins out"
                )
        whiten = self.options.whiten
        groups = readers(block, list(linears)) if whiten != "none" else [[name] for name in linears]
        metrics = self._metrics(block, groups)
        for group in groups:
            for name in group:
                metric, seen = metrics.pop(name)
                self._factorise(block, name, linears[name], metric, seen)

    def _metrics(
        self, block: Block, groups: list[list[str]]
    ) -> dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]:
        """Return for every linear its metric, and the second moments of its inputs where they were taken."""
        options = self.options
        found: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        for group in groups:
            if options.whiten == "none":
                found |= dict.fromkeys(group, (None, None))
                continue
            owner = shared(block, group)
            firsts = list(dict.fromkeys(owner.values()))
            if options.whiten == "asvd":
                sizes = block.mean_abs(firsts)
                scale = {name: sizes[name].pow(options.alpha).clamp(min=LEAST_SCALE) for name in firsts}
                found |= {name: (scale[first], None) for name, first in owner.items()}
                continue
            seen = moments(block, group)
            lower = {
                name: whitener(seen[name], damp=options.damp, name=f"{block.name}.{name}") for name in firsts
            }
            found |= {name: (lower[first], seen[first]) for name, first in owner.items()}
        return found

    def _factorise(
        self, block: Block, name: str, linear: Any, metric: torch.Tensor | None, seen: torch.Tensor | None
    ) -> None:
        full = f"{block.name}.{name}"
        weight = linear.weight.detach()
        rank = rank_for(self.options.ratio, *weight.shape, full)
        left, right = (part.to(weight.dtype) for part in factors(weight, rank, metric, full))
        wrong = weight.double() - left.double() @ right.double()
        if seen is None:
            error = float(wrong.square().sum() / weight.double().square().sum().clamp(min=1e-300))
        else:
            error = output_error(wrong, seen) / max(output_error(weight, seen), 1e-300)
        block.record(name, low_rank=rank, low_rank_error=error)
        new = Factored.from_factors(left, right, linear.bias)
        rotation = getattr(linear, "rotation", None)
        if rotation is not None:
            new.first.rotated(rotation)
        block.replace(name, new)
