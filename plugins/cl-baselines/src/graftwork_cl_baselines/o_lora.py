"""O-LoRA: one LoRA per task, the new one's input directions kept orthogonal to the older ones'.

Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", Findings of EMNLP
2023; the form of the penalty is that of the official code (sum of absolute values, not squares).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from graftwork import Adapter, LossTerm, UserError, hookimpl
from pydantic import Field

from graftwork_cl_baselines.stacked import Factors, StackedOptions, factors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graftwork.data.tasks import Task
    from graftwork.run import Run
    from transformers import PreTrainedModel, Trainer


class OLoraOptions(StackedOptions):
    """Options of O-LoRA."""

    lambda_orth: float = Field(0.5, ge=0, description="weight of the orthogonality penalty (lambda1)")
    lambda_norm: float = Field(0.0, ge=0, description="weight of the Frobenius norms of A and B (lambda2)")
    form: Literal["sum", "mean"] = Field(
        "sum", description="sum: as published, grows with layers, rank and tasks; mean: per entry (ours)"
    )


class OLora:
    """A fresh LoRA per task, all earlier ones frozen, summed at inference; penalty on A_old A_new^T."""

    Options = OLoraOptions
    sharding = frozenset({"zero2"})

    def __init__(self, options: OLoraOptions) -> None:
        self.options = options

    @hookimpl
    def adapter_config(self, run: Run, model: PreTrainedModel) -> Adapter:
        return self.options.adapter()

    @hookimpl
    def loss_terms(self, run: Run, model: torch.nn.Module) -> Sequence[LossTerm]:
        options, layers = self.options, factors(model)
        terms = []
        if options.lambda_orth and any(layer.old for layer in layers):
            terms.append(
                LossTerm(
                    "orth", lambda *_: orthogonality(layers, options.form), options.lambda_orth, per="step"
                )
            )
        if options.lambda_norm:
            terms.append(LossTerm("norm", lambda *_: norms(layers), options.lambda_norm, per="step"))
        return terms

    @hookimpl
    def task_end(self, run: Run, task: Task, trainer: Trainer) -> None:
        # A silent zero is the commonest failure reported of the official code: say so instead.
        found = any(layer.old for layer in factors(trainer.model))
        if task.index > 0 and self.options.lambda_orth and not found:
            raise UserError(
                "o-lora found no earlier adapter to be orthogonal to; the stream did not stack its adapters"
            )


def orthogonality(layers: list[Factors], form: str = "sum") -> torch.Tensor:
    """Return ``sum over layers of sum_i sum_ab |(A_i A^T)_ab|`` (O-LoRA), or its mean per entry (ours)."""
    products = [torch.cat(layer.old).float() @ layer.a.float().T for layer in layers if layer.old]
    total = torch.stack([product.abs().sum() for product in products]).sum()
    return total if form == "sum" else total / sum(product.numel() for product in products)


def norms(layers: list[Factors]) -> torch.Tensor:
    """Return ``sum over layers of ||A||_F + ||B||_F`` of the adapter that trains (O-LoRA's second term)."""
    return torch.stack([norm(layer.a) + norm(layer.b) for layer in layers]).sum()


def norm(matrix: torch.Tensor) -> torch.Tensor:
    """Return the Frobenius norm with gradient 0 (not NaN) at the zero matrix, where B starts."""
    square = matrix.float().square().sum()
    return torch.where(square > 0, square.clamp_min(1e-30).sqrt(), square)
