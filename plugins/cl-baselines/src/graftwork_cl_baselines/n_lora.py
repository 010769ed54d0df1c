"""N-LoRA: one LoRA per task, the new one's update kept sparse so that it collides with few older entries.

Yang et al., "Is Parameter Collision Hindering Continual Learning in LLMs?", COLING 2025. The paper writes
the penalty on the product ``B A`` (d_out x d_in); the official code takes ``A B`` (r x r) instead, which
exists where a layer is square.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from graftwork import Adapter, LossTerm, UserError, hookimpl
from pydantic import Field

from graftwork_cl_baselines.stacked import Factors, StackedOptions, adapted_layers, factors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graftwork.run import Run
    from transformers import PreTrainedModel

# The published weight is that of the form ``code``. The others (ours) give a penalty of the same size on the
# official setting (144 square layers of d = 1024, r = 8), for entries of A and B drawn independently of each
# other: an r x r product of inner products over d has (d / r)^1.5 times less mass than a d x d one over r.
STRENGTH = {"code": 0.4, "product": 3e-4, "mean": 4e4}


class NLoraOptions(StackedOptions):
    """Options of N-LoRA."""

    strength: float | None = Field(
        None,
        ge=0,
        description=f"weight of the sparsity (lambda); by form where not given: "
        f"{', '.join(f'{form} {value:g}' for form, value in STRENGTH.items())}",
    )
    form: Literal["product", "mean", "code"] = Field(
        "product",
        description="product: sum of |B A|, the paper's text; mean: the same per entry (ours); code: sum of |A B|, "
        "the official code, for square layers only",
    )

    @property
    def weight(self) -> float:
        return STRENGTH[self.form] if self.strength is None else self.strength


class NLora:
    """A fresh LoRA per task, all earlier ones frozen, summed at inference; L1 norm of the new update."""

    Options = NLoraOptions
    sharding = frozenset({"zero2"})

    def __init__(self, options: NLoraOptions) -> None:
        self.options = options

    @hookimpl
    def adapter_config(self, run: Run, model: PreTrainedModel) -> Adapter:
        adapter = self.options.adapter()
        if self.options.form == "code":
            for name, layer in adapted_layers(adapter, model).items():
                if layer.in_features != layer.out_features:
                    raise UserError(
                        f"plugin 'n-lora': form 'code' needs square layers and '{name}' is "
                        f"{layer.out_features} x {layer.in_features}; set plugins.n-lora.form: product, or name "
                        f"square layers in plugins.n-lora.target_modules"
                    )
        return adapter

    @hookimpl
    def loss_terms(self, run: Run, model: torch.nn.Module) -> Sequence[LossTerm]:
        if not self.options.weight:
            return []
        layers, form = factors(model), self.options.form
        return [LossTerm("sparse", lambda *_: sparsity(layers, form), self.options.weight, per="step")]


def sparsity(layers: Sequence[Factors], form: str = "product") -> torch.Tensor:
    """Return the summed absolute entries of the new update over all layers.

    ``product``: sum over layers of ``||B A||_1`` (N-LoRA's text); ``mean``: the same divided by the number of
    entries (ours); ``code``: sum over layers of ``||A B||_1`` (r x r; its official code).
    """
    if form == "code":
        return torch.stack([(_wide(layer.a) @ _wide(layer.b)).abs().sum() for layer in layers]).sum()
    total = torch.stack([product_norm(layer.b, layer.a) for layer in layers]).sum()
    return total if form == "product" else total / sum(len(layer.b) * layer.a.shape[1] for layer in layers)


def product_norm(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Return ``||B A||_1``, the sum of absolute entries, of B (d_out x r) and A (r x d_in).

    The product is dropped before this returns: its gradient is kept as the two r-sized matrices it becomes.
    """
    return _ProductNorm.apply(b, a)


class _ProductNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        left, right = _wide(b), _wide(a)
        product = left @ right
        sign = product.sign()
        ctx.save_for_backward((sign @ right.T).to(b.dtype), (left.T @ sign).to(a.dtype))
        return product.abs().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        of_b, of_a = ctx.saved_tensors
        return grad.to(of_b.dtype) * of_b, grad.to(of_a.dtype) * of_a


def _wide(matrix: torch.Tensor) -> torch.Tensor:
    """Return ``matrix`` in fp32, or in its own precision where that is higher."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
