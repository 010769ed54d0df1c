"""Log-probabilities of targets, teacher forced, in float32 and at the target's positions alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from graftwork.edit.encoding import BUDGET, Batch, Row, batches, pad


@dataclass(frozen=True)
class Scored:
    """What a model says about one row's target, per token.

    Attributes:
        log_probs: of the target's tokens (nats, float32).
        hits: whether they are the likeliest.
        likeliest: the token that is; where the row has no target, the one that would follow.
    """

    log_probs: torch.Tensor
    hits: torch.Tensor
    likeliest: torch.Tensor

    @property
    def mean(self) -> float:
        """J: the mean log-probability per token (nats)."""
        return float(self.log_probs.mean())

    @property
    def strict(self) -> float:
        """1 where every token is the likeliest, else 0."""
        return float(self.hits.all())

    @property
    def loose(self) -> float:
        """Share of tokens that are the likeliest."""
        return float(self.hits.float().mean())


def late_logits(model: Any, batch: Batch, first: int) -> tuple[torch.Tensor, int]:
    """Return the logits from position ``first`` of the batch on (B x L x V), and where they really start.

    A head is the largest product of a short batch, and most positions are not asked for.
    """
    length = batch.inputs["input_ids"].shape[1]
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**batch.inputs, logits_to_keep=length - first).logits, first
    return model(**batch.inputs).logits, 0


def target_logits(model: Any, batch: Batch) -> list[torch.Tensor]:
    """Return for each row the logits that predict its target (tokens x V, float32), with gradient where it is on."""
    shifts = batch.shift.tolist()
    lasts = [shift + row.last for shift, row in zip(shifts, batch.rows, strict=True)]
    logits, begin = late_logits(model, batch, min(lasts))
    return [
        logits[number, last - begin : last - begin + max(1, len(row.target))].float()
        for number, (last, row) in enumerate(zip(lasts, batch.rows, strict=True))
    ]


def of_targets(logits: torch.Tensor, row: Row) -> torch.Tensor:
    """Return the log-probabilities of a row's target from its logits (tokens x V)."""
    ids = torch.tensor(row.target, dtype=torch.long, device=logits.device)
    return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def score(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    side: Literal["right", "left"] = "right",
    budget: int = BUDGET,
    progress: Callable[[int], Any] | None = None,
) -> list[Scored]:
    """Return what the model says about the targets of ``rows``, in their order."""
    found: list[Scored] = []
    with torch.no_grad():
        for some in batches(rows, budget):
            for row, logits in zip(
                some, target_logits(model, pad(some, tokenizer, model, side)), strict=True
            ):
                likeliest = logits.argmax(-1).cpu()
                hits = likeliest == torch.tensor(row.target, dtype=torch.long)
                found.append(Scored(of_targets(logits, row).cpu(), hits, likeliest))
            if progress:
                progress(len(some))
    return found
