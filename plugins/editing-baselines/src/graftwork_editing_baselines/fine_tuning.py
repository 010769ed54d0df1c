"""Constrained fine-tuning of one MLP projection: FT-M and FT-L.

Adam on W, and after every step every weight back to within ``clamp`` of where it was (L-inf). FT-M is cross-entropy
on the target's tokens, teacher forced. FT-L, as common toolkits have it, reads *all* target tokens from the
distribution at the last prompt token, so targets of several tokens are trained wrongly; it is here to show what that
does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from graftwork.console import Console
from graftwork.edit.draft import Draft
from graftwork.edit.edits import Change, EditSet
from graftwork.edit.encoding import Batch, Row, batches, encode_request, pad
from graftwork.edit.plugin import EditOptions, EditPlugin
from graftwork.edit.requests import Request
from graftwork.edit.scoring import of_targets, target_logits
from graftwork.edit.sites import Site, find_sites
from graftwork.edit.statistics import Provider
from graftwork.errors import UserError
from pydantic import Field
from transformers.pytorch_utils import Conv1D

from graftwork_editing_baselines.band import band


class FineTuningOptions(EditOptions):
    """Options of constrained fine-tuning."""

    layer: int | None = Field(
        None, ge=0, description="layer to train; 21 of 28 (late, as in GPT-J's file) if not set"
    )
    loss: Literal["m", "l"] = Field("m", description="m: cross-entropy on the target's tokens; l: FT-L's")
    steps: int = Field(25, ge=1, description="steps of Adam")
    lr: float = Field(5e-4, gt=0, description="of Adam")
    clamp: float | None = Field(
        5e-5, gt=0, description="largest change of a weight; the reference's for GPT-J; null lifts it"
    )
    stop: float = Field(0.01, ge=0, description="stop when the loss is below")


class _Moved:
    """A linear whose weight is ``W + delta`` for a while, with gradients to delta alone.

    The weight is hidden by an attribute of its name and comes back as it was, in its place among the parameters.
    """

    def __init__(self, module: Any, delta: torch.Tensor) -> None:
        self.module, self.delta = module, delta
        self.kept: dict[str, Any] = {}

    def __enter__(self) -> _Moved:
        self.kept = dict(self.module._parameters)
        del self.module._parameters["weight"]
        return self

    def move(self) -> None:
        """Put the weight where delta is now."""
        weight = self.kept["weight"].detach()
        self.module.__dict__["weight"] = (weight.float() + self.delta).to(weight.dtype)

    def __exit__(self, *error: object) -> None:
        self.module.__dict__.pop("weight", None)
        self.module._parameters.clear()
        self.module._parameters.update(self.kept)


def loss_of(batch: Batch, logits: Sequence[torch.Tensor], kind: Literal["m", "l"]) -> torch.Tensor:
    """Return the sum over rows of the mean negative log-likelihood of their targets."""
    found = []
    for row, mine in zip(batch.rows, logits, strict=True):
        seen = mine if kind == "m" else mine[:1].expand(len(row.target), -1)
        found.append(-of_targets(seen, row).mean())
    return torch.stack(found).sum()


class FineTuningEditor:
    """FT-M or FT-L as an editor."""

    name = "ft"
    uses_statistics = False

    def __init__(self, options: FineTuningOptions) -> None:
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
        named = None if options.layer is None else [options.layer]
        (layer,) = band(model, named, 21 / 28, 21 / 28, self.name)
        (site,) = find_sites(model, ["mlp"], [layer])
        rows = [encode_request(tokenizer, request) for request in requests]
        delta, losses = self._learn(model, tokenizer, rows, site, console)
        with Draft(model, [site], max_share=options.max_share) as draft:
            draft.write(site, Change.of_dense(delta))
            report = {"layer": layer, "losses": losses}
            return draft.edit_set(self.name, self.name, requests, options.model_dump(), report)

    def _learn(
        self, model: Any, tokenizer: Any, rows: Sequence[Row], site: Site, console: Console
    ) -> tuple[torch.Tensor, list[float]]:
        options = self.options
        weight: Any = site.module.weight
        delta = torch.zeros(weight.shape, device=weight.device, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=options.lr)
        parts = [pad(some, tokenizer, model) for some in batches(rows)]
        losses: list[float] = []
        with (
            torch.enable_grad(),
            console.bar(options.steps, self.name, "step") as bar,
            _Moved(site.module, delta) as moved,
        ):
            for _ in range(options.steps):
                delta.grad = torch.zeros_like(delta)
                total = 0.0
                for batch in parts:
                    moved.move()
                    loss = loss_of(batch, target_logits(model, batch), options.loss) / len(rows)
                    (gradient,) = torch.autograd.grad(loss, [delta])
                    delta.grad += gradient
                    total += float(loss.detach())
                if not total < float("inf"):
                    raise UserError(f"fine-tuning diverged after {len(losses)} steps; lower plugins.ft.lr")
                losses.append(total)
                if total < options.stop:
                    break
                adam.step()
                if options.clamp is not None:
                    with torch.no_grad():
                        delta.clamp_(-options.clamp, options.clamp)
                bar.update(1)
        found = delta.detach().cpu()
        # As W is h x d: Conv1D stores it transposed.
        return (found.T if isinstance(site.module, Conv1D) else found), losses


class FineTuning(EditPlugin):
    """Constrained fine-tuning as a plugin."""

    name = "ft"
    Options = FineTuningOptions

    @classmethod
    def editor(cls, options: FineTuningOptions) -> FineTuningEditor:
        return FineTuningEditor(options)
