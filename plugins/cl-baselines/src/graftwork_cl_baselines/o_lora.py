"""O-LoRA: one LoRA per task, the new one's input directions kept orthogonal to the older ones'.

Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", Findings of EMNLP
2023; the form of the penalty is that of the official code (sum of absolute values, not squares).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from graftwork import Adapter, LossTerm, UserError, hookimpl
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graftwork.data.tasks import Task
    from graftwork.run import Run
    from transformers import PreTrainedModel, Trainer


class OLoraOptions(BaseModel):
    """Options of O-LoRA."""

    model_config = ConfigDict(extra="forbid")

    rank: int = Field(8, ge=1, description="rank of every task's adapter")
    alpha: float = Field(32, gt=0, description="LoRA alpha; the scale is alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout (0.1 in the official scripts)")
    target_modules: str | list[str] = Field("all-linear", description="as in PEFT")
    lambda_orth: float = Field(0.5, ge=0, description="weight of the orthogonality penalty (lambda1)")
    lambda_norm: float = Field(0.0, ge=0, description="weight of the Frobenius norms of A and B (lambda2)")
    form: Literal["sum", "mean"] = Field(
        "sum", description="sum: as published, grows with layers, rank and tasks; mean: per entry (ours)"
    )


class OLora:
    """A fresh LoRA per task, all earlier ones frozen, summed at inference; penalty on A_old A_new^T."""

    Options = OLoraOptions

    def __init__(self, options: OLoraOptions) -> None:
        self.options = options

    @hookimpl
    def adapter_config(self, run: Run, model: PreTrainedModel) -> Adapter:
        options = self.options
        config = LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=options.target_modules,
            task_type="CAUSAL_LM",
        )
        return Adapter(config, "stacked")

    @hookimpl
    def loss_terms(self, run: Run, model: torch.nn.Module) -> Sequence[LossTerm]:
        options, pairs = self.options, factors(model)
        terms = []
        if options.lambda_orth and any(old for old, _, _ in pairs):
            terms.append(
                LossTerm(
                    "orth", lambda *_: orthogonality(pairs, options.form), options.lambda_orth, per="step"
                )
            )
        if options.lambda_norm:
            terms.append(LossTerm("norm", lambda *_: norms(pairs), options.lambda_norm, per="step"))
        return terms

    @hookimpl
    def task_end(self, run: Run, task: Task, trainer: Trainer) -> None:
        # A silent zero is the commonest failure reported of the official code: say so instead.
        pairs = factors(trainer.model)
        if task.index > 0 and self.options.lambda_orth and not any(old for old, _, _ in pairs):
            raise UserError(
                "o-lora found no earlier adapter to be orthogonal to; the stream did not stack its adapters"
            )


def factors(model: torch.nn.Module) -> list[Any]:
    """Return ``(A of frozen adapters, A, B of the one that trains)`` for every LoRA layer.

    A is (rank x d_in), B is (d_out x rank), PEFT's naming.
    """
    found = []
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        new = [name for name in names if layer.lora_A[name].weight.requires_grad]
        if new:
            old = [layer.lora_A[name].weight.detach() for name in names if name not in new]
            found.append((old, layer.lora_A[new[-1]].weight, layer.lora_B[new[-1]].weight))
    return found


def orthogonality(pairs: list[Any], form: str = "sum") -> torch.Tensor:
    """Return ``sum over layers of sum_i sum_ab |(A_i A^T)_ab|`` (O-LoRA), or its mean per entry (ours)."""
    products = [torch.cat(old).float() @ new.float().T for old, new, _ in pairs if old]
    total = torch.stack([product.abs().sum() for product in products]).sum()
    return total if form == "sum" else total / sum(product.numel() for product in products)


def norms(pairs: list[Any]) -> torch.Tensor:
    """Return ``sum over layers of ||A||_F + ||B||_F`` of the adapter that trains (O-LoRA's second term)."""
    return torch.stack([norm(a) + norm(b) for _, a, b in pairs]).sum()


def norm(matrix: torch.Tensor) -> torch.Tensor:
    """Return the Frobenius norm with gradient 0 (not NaN) at the zero matrix, where B starts."""
    square = matrix.float().square().sum()
    return torch.where(square > 0, square.clamp_min(1e-30).sqrt(), square)
