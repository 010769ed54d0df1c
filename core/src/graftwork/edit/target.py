"""The state that makes a model say the target: a vector added at the subject's last token, found by gradient descent.

    loss = - mean over rows of J(row) + kl KL(p_clean(. | "{s} is a") || p_delta) + decay sum ||delta|| / ||h||^2

with ||delta|| <= clamp ||h||, by Adam. Source: protocol section 2 and dem.md D.1, after the code of ROME and MEMIT;
several points at once after PMET; variants among the rows are ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from graftwork.edit.encoding import encode, pad, rows_of
from graftwork.edit.errors import LocalizationError
from graftwork.edit.requests import Request
from graftwork.edit.scoring import of_targets, target_logits
from graftwork.errors import UserError
from graftwork.transform.structure import first_tensor


class StateOptions(BaseModel):
    """How the target state is found."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(25, ge=1, description="forward passes at most; one fewer steps of Adam")
    lr: float = Field(0.5, gt=0, description="of Adam")
    kl: float = Field(0.0625, ge=0, description="weight of the divergence on '{subject} is a'")
    decay: float = Field(0.5, ge=0, description="weight of ||delta|| / ||h||^2")
    clamp: float = Field(0.75, gt=0, description="largest ||delta|| / ||h||")
    stop: float = Field(0.05, ge=0, description="stop when the loss is below")
    prefixes: int = Field(5, ge=0, description="openings that the model writes, put before the prompt")
    prefix_tokens: int = Field(10, ge=1, description="tokens of such an opening")
    variants: int = Field(0, ge=0, description="variants of the subject among the prompts")
    known: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor on the likelihood while the target is the likeliest already and KL > 0.01",
    )


@dataclass(frozen=True)
class State:
    """By point: the clean output (h, float32) at the anchor of the bare prompt, and what is added to it."""

    clean: Mapping[str, torch.Tensor]
    delta: Mapping[str, torch.Tensor]
    losses: Sequence[float]

    @property
    def target(self) -> dict[str, torch.Tensor]:
        """By point: z = h + delta."""
        return {name: self.clean[name] + self.delta[name] for name in self.clean}


@contextlib.contextmanager
def adding(
    points: Mapping[str, nn.Module], deltas: Mapping[str, torch.Tensor], anchors: torch.Tensor
) -> Iterator[dict[str, torch.Tensor]]:
    """Add ``deltas`` to the outputs of modules at ``anchors`` (one position per row); yields the outputs before."""
    seen: dict[str, torch.Tensor] = {}
    with contextlib.ExitStack() as stack:
        for name, module in points.items():

            def hook(_: Any, args: Any, output: Any, name: str = name) -> Any:
                hidden = first_tensor(output)
                at = anchors.to(hidden.device)
                seen[name] = hidden.detach()[torch.arange(len(at), device=hidden.device), at].float()
                spot = torch.zeros(hidden.shape[:2], device=hidden.device)
                spot[torch.arange(len(at), device=hidden.device), at] = 1
                moved = hidden + (spot[..., None] * deltas[name].to(hidden.device)).to(hidden.dtype)
                return moved if torch.is_tensor(output) else (moved, *output[1:])

            stack.callback(module.register_forward_hook(hook).remove)
        yield seen


def optimise_state(
    model: Any,
    tokenizer: Any,
    request: Request,
    points: Mapping[str, nn.Module],
    options: StateOptions,
    prefixes: Sequence[str] = (),
) -> State:
    """Return the state at ``points`` (decoder layers, or modules of sites, by name) that makes the target likely.

    Weights and their ``requires_grad`` are never touched.

    Raises:
        UserError: the loss is no number.
        LocalizationError: nothing that is added there reaches the target, as behind the last layer.
    """
    rows = rows_of(tokenizer, request, prefixes, variants=options.variants)
    count = len(rows)
    subject = (0, len(request.subject))
    # What the subject is must not change.
    rows.append(encode(tokenizer, f"{request.subject} is a", subject=subject))
    batch = pad(rows, tokenizer, model)
    width = model.config.get_text_config().hidden_size
    deltas = {name: torch.zeros(width, requires_grad=True, device=batch.shift.device) for name in points}
    adam = torch.optim.Adam(list(deltas.values()), lr=options.lr)
    clean: dict[str, torch.Tensor] = {}
    losses: list[float] = []
    before: torch.Tensor | None = None
    with torch.enable_grad(), adding(points, deltas, batch.anchors) as seen:
        for step in range(options.steps):
            logits = target_logits(model, batch)
            essence = logits[-1].log_softmax(-1)
            if before is None:
                before = essence.detach()
                clean = {name: value[0].clone() for name, value in seen.items()}
            likely = torch.stack([of_targets(logits[i], rows[i]).mean() for i in range(count)]).mean()
            drift = (before.exp() * (before - essence)).sum()
            factor = 1.0
            if options.known < 1 and float(drift.detach()) > 0.01 and _known(logits[:count], rows[:count]):
                factor = options.known
            size = sum(
                (delta.norm() / clean[name].norm().square() for name, delta in deltas.items()),
                torch.zeros((), device=batch.shift.device),
            )
            loss = -factor * likely + options.kl * drift + options.decay * size
            value = float(loss.detach())
            if not value < float("inf"):
                raise UserError(
                    f"request '{request.id}': the loss of its state is no number after {step} steps; lower "
                    f"the learning rate, or use float32"
                )
            losses.append(value)
            if value < options.stop or step + 1 == options.steps:
                break
            gradients = torch.autograd.grad(loss, list(deltas.values()))
            if step == 0 and not any(bool(one.any()) for one in gradients):
                raise LocalizationError(
                    f"request '{request.id}': what is added at {' and '.join(points)} cannot reach the target; edit at "
                    f"an earlier layer"
                )
            for delta, gradient in zip(deltas.values(), gradients, strict=True):
                # The norm has no direction at zero, where the pull of the decay is none.
                delta.grad = torch.nan_to_num(gradient)
            adam.step()
            with torch.no_grad():
                for name, delta in deltas.items():
                    bound = options.clamp * clean[name].norm()
                    if delta.norm() > bound:
                        delta.mul_(bound / delta.norm())
    return State(
        {name: value.cpu() for name, value in clean.items()},
        {name: delta.detach().float().cpu() for name, delta in deltas.items()},
        losses,
    )


def _known(logits: Sequence[torch.Tensor], rows: Sequence[Any]) -> bool:
    return all(one.argmax(-1).tolist() == list(row.target) for one, row in zip(logits, rows, strict=True))
