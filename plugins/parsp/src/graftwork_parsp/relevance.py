"""How much each neuron matters for a task: equation (1), the Taylor form of Leng and Xiong (COLING 2025, eqs 1-3).

    R[i, j] = mean over items n of | sum over tokens l of a_j[n, l] * dL_n / da_j[n, l] |

a is what the output projection reads, L_n the item's own loss. To first order it is by how much the loss changes
when the neuron is switched off. The absolute value per item and the mean over items are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from graftwork import UserError
from graftwork.distributed import sum_over_ranks
from graftwork.evaluate.modes import evaluating
from graftwork.train.statistics import answer_losses
from torch import nn

from graftwork_parsp.neurons import Mlp, base_of

Batch = Mapping[str, torch.Tensor]


def relevance(
    model: nn.Module,
    mlps: Sequence[Mlp],
    batches: Iterable[Batch],
    *,
    task: str,
    losses: Callable[[nn.Module, Batch], torch.Tensor] = answer_losses,
) -> dict[str, torch.Tensor]:
    """Return R (m, float64, on the CPU) of every MLP by name, over the items of all processes.

    ``losses`` gives each item's own loss (b). One forward and one backward pass per batch in eval mode; weights,
    their gradients and the random state stay as they are.

    Raises:
        UserError: the loss has no gradient at a layer's neurons, or one that is no number.
    """
    sums = {mlp.name: torch.zeros(mlp.neurons, dtype=torch.float64) for mlp in mlps}
    items = 0
    seen: dict[str, torch.Tensor] = {}
    with evaluating(model), torch.enable_grad(), _watching(base_of(model), mlps, seen):
        for batch in batches:
            seen.clear()
            loss = losses(model, batch).sum()
            activations = [seen[mlp.name] for mlp in mlps]
            if not loss.requires_grad:
                raise UserError(_no_gradient(task, mlps[0]))
            gradients = torch.autograd.grad(loss, activations, allow_unused=True)
            count = len(batch["input_ids"])
            for mlp, a, gradient in zip(mlps, activations, gradients, strict=True):
                if gradient is None:
                    raise UserError(_no_gradient(task, mlp))
                per_item = (a.detach().float() * gradient.float()).reshape(count, -1, mlp.neurons).sum(1)
                sums[mlp.name] += per_item.abs().double().sum(0).cpu()
            items += count
    device = next(model.parameters()).device
    total = int(sum_over_ranks(torch.tensor(items, device=device)))
    result = {}
    for mlp in mlps:
        value = sum_over_ranks(sums[mlp.name].to(device)).cpu() / max(total, 1)
        if not torch.isfinite(value).all():
            raise UserError(
                f"task '{task}': the relevance of the neurons of '{mlp.name}' is not a finite number; load the model "
                f"with dtype float32"
            )
        if not value.any():
            raise UserError(_no_gradient(task, mlp))
        result[mlp.name] = value
    return result


def _no_gradient(task: str, mlp: Mlp) -> str:
    return (
        f"task '{task}': the loss has no gradient at the neurons of '{mlp.name}', so none can be told from another; "
        f"its items need answer tokens to learn, and the model must not run without gradients"
    )


@contextmanager
def _watching(base: nn.Module, mlps: Sequence[Mlp], seen: dict[str, torch.Tensor]) -> Iterator[None]:
    """Put what every output projection reads into ``seen``, and make it a part of the graph if it is none yet."""

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            a = args[0] if args[0].requires_grad else args[0].detach().requires_grad_(True)
            seen[name] = a
            return (a, *args[1:])

        return hook

    handles = [base.get_submodule(mlp.out).register_forward_pre_hook(watch(mlp.name)) for mlp in mlps]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
