"""The recursive cross-entropy of BDQ: cross-entropy plus or minus a term in which the prediction weighs itself.

For a target distribution q and the prediction ``p = softmax(z)`` over the vocabulary::

    CE = - sum_i q_i ln p_i          S = sum_i p_i ln(delta p_i + (1 - delta) q_i)

``printed`` is ``CE + S``, as two readers of the paper copied it. It rewards spreading: with a one-hot q and delta = 0.5
a perfect prediction has 0 and the uniform one over V tokens about ``-ln 2``. ``symmetric``, ours and the default, is
``CE - S``, which is 0 for a perfect prediction and positive otherwise, as the symmetric cross-entropy has it.

With a one-hot q at token y the sum has a closed form::

    S = -H(p) + (1 - p_y) ln delta + p_y (ln(delta p_y + 1 - delta) - ln p_y)

so the largest logit, the sum of exponentials, their product with the logits and the label's logit are all that a row
needs. Rows are walked a few at a time, forward and backward, so no second tensor of the size of the logits is made
besides their gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

Sign = Literal["symmetric", "printed"]
IGNORED = -100
CHUNK_BYTES = 32 * 2**20


def recursive_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    delta: float = 0.5,
    sign: Sign = "symmetric",
    teacher: torch.Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> torch.Tensor:
    """Return the loss of every row (n, float32; float64 for float64 logits), in nats; 0 where the label is -100.

    ``logits`` is n x V, ``labels`` (n) are from 0 to V - 1 or -100. ``teacher`` (n x V, logits of another model, no
    gradient) makes its softmax the target q instead of the label.

    Raises:
        ValueError: ``delta`` outside (0, 1], or an unknown ``sign``.
    """
    return _rows(logits, labels, teacher, delta, _factor(sign), 1.0, chunk_bytes)


def self_weighed(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    delta: float = 0.5,
    teacher: torch.Tensor | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> torch.Tensor:
    """Return S of every row (n), as :func:`recursive_cross_entropy` does."""
    return _rows(logits, labels, teacher, delta, 1.0, 0.0, chunk_bytes)


class RceLoss(nn.Module):
    """The recursive cross-entropy as a token loss for any trainer: the mean over the rows that have a label.

    Raises:
        ValueError: ``delta`` outside (0, 1], or an unknown ``sign``.
    """

    def __init__(self, delta: float = 0.5, sign: Sign = "symmetric") -> None:
        super().__init__()
        check_delta(delta)
        _factor(sign)
        self.delta, self.sign = delta, sign

    def forward(
        self, logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the mean loss of ``logits`` (... x V) at ``labels`` (...); 0, with gradient 0, where none counts."""
        flat = labels.reshape(-1)
        rows = recursive_cross_entropy(
            logits.reshape(len(flat), -1),
            flat,
            delta=self.delta,
            sign=self.sign,
            teacher=None if teacher is None else teacher.reshape(len(flat), -1),
        )
        return rows.sum() / (flat != IGNORED).sum().clamp_min(1)


def check_delta(delta: float) -> None:
    """Refuse a ``delta`` whose logarithm does not exist, or that is no share.

    Raises:
        ValueError: outside (0, 1].
    """
    if not 0 < delta <= 1:
        raise ValueError(f"delta is a share greater than 0 and at most 1, not {delta}")


def _factor(sign: str) -> float:
    if sign not in ("symmetric", "printed"):
        raise ValueError(f"sign is 'symmetric' (CE - S) or 'printed' (CE + S), not '{sign}'")
    return -1.0 if sign == "symmetric" else 1.0


def _rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor | None,
    delta: float,
    of_s: float,
    of_ce: float,
    chunk_bytes: int,
) -> torch.Tensor:
    check_delta(delta)
    rows = max(1, chunk_bytes // (4 * max(1, logits.shape[-1])))
    function = _OneHot if teacher is None else _Teacher
    extra = () if teacher is None else (teacher.detach(),)
    return cast(torch.Tensor, function.apply(logits, labels, delta, of_s, of_ce, rows, *extra))


class _OneHot(torch.autograd.Function):
    """``of_ce CE + of_s S`` of every row, for a one-hot target.

    The gradient, with A = -H(p) and D = delta p_y + 1 - delta::

        dCE/dz_k = p_k - [k = y]
        dS/dz_k  = p_k (ln p_k - A) + b p_y ([k = y] - p_k)
        b        = ln D - ln p_y - ln delta + delta p_y / D - 1
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        delta: float,
        of_s: float,
        of_ce: float,
        rows: int,
    ) -> torch.Tensor:
        exact = torch.promote_types(logits.dtype, torch.float32)
        counts = labels != IGNORED
        chosen = labels.clamp_min(0)
        normaliser = torch.empty(len(logits), dtype=exact, device=logits.device)
        negentropy = torch.empty_like(normaliser)
        for part in _parts(len(logits), rows):
            z = logits[part].to(exact)
            largest = z.amax(1)
            z = z - largest[:, None]
            mass = z.exp()
            total = mass.sum(1)
            negentropy[part] = mass.mul_(z).sum(1) / total - total.log()
            normaliser[part] = largest + total.log()
        log_p = logits.gather(1, chosen[:, None]).squeeze(1).to(exact) - normaliser
        p = log_p.exp()
        inside = delta * p + (1 - delta)
        # p ln p is 0 where p is; delta = 1 leaves no label in the sum, and the two logarithms cancel.
        at_label = p * (_log(inside) - log_p) if delta < 1 else torch.zeros_like(p)
        s = negentropy + (1 - p) * math.log(delta) + at_label
        ctx.save_for_backward(logits, chosen, counts, normaliser, negentropy, log_p)
        ctx.settings = delta, of_s, of_ce, rows
        return (of_s * s - of_ce * log_p).masked_fill(~counts, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        logits, chosen, counts, normaliser, negentropy, log_p = ctx.saved_tensors
        delta, of_s, of_ce, rows = ctx.settings
        gradient = gradient.masked_fill(~counts, 0)
        p = log_p.exp()
        inside = delta * p + (1 - delta)
        slope = (
            p * (_log(inside) - log_p - math.log(delta)) - p * (1 - delta) / inside if delta < 1 else 0 * p
        )
        found = torch.empty_like(logits)
        for part in _parts(len(logits), rows):
            log = logits[part].to(normaliser.dtype) - normaliser[part, None]
            each = log.exp()
            of_logits = each * (of_ce + of_s * (log - (negentropy + slope)[part, None]))
            at_label = (of_s * slope - of_ce)[part, None]
            of_logits.scatter_add_(1, chosen[part, None], at_label)
            found[part] = of_logits.mul_(gradient[part, None]).to(logits.dtype)
        return found, None, None, None, None, None


class _Teacher(torch.autograd.Function):
    """The same with the softmax of other logits as the target.

    With ``D_i = delta p_i + (1 - delta) q_i``: ``dS/dz_k = p_k (g_k - sum_i p_i g_i)``,
    ``g_i = ln D_i + delta p_i / D_i``; ``dCE/dz_k = p_k - q_k``. D is held as its logarithm, so nothing is 0 / 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        delta: float,
        of_s: float,
        of_ce: float,
        rows: int,
        teacher: torch.Tensor,
    ) -> torch.Tensor:
        exact = torch.promote_types(logits.dtype, torch.float32)
        counts = labels != IGNORED
        loss = torch.empty(len(logits), dtype=exact, device=logits.device)
        for part in _parts(len(logits), rows):
            log_p, log_q, log_d = _logs(logits[part], teacher[part], delta, exact)
            s = (log_p.exp() * log_d).sum(1)
            ce = -(log_q.exp() * log_p).sum(1)
            loss[part] = of_s * s + of_ce * ce
        ctx.save_for_backward(logits, teacher, counts)
        ctx.settings = delta, of_s, of_ce, rows
        return loss.masked_fill(~counts, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        logits, teacher, counts = ctx.saved_tensors
        delta, of_s, of_ce, rows = ctx.settings
        gradient = gradient.masked_fill(~counts, 0)
        found = torch.empty_like(logits)
        for part in _parts(len(logits), rows):
            log_p, log_q, log_d = _logs(logits[part], teacher[part], delta, gradient.dtype)
            p = log_p.exp()
            g = log_d + delta * (log_p - log_d).exp()
            of_s_here = p * (g - (p * g).sum(1, keepdim=True))
            of_logits = of_s * of_s_here + of_ce * (p - log_q.exp())
            found[part] = of_logits.mul_(gradient[part, None]).to(logits.dtype)
        return found, None, None, None, None, None, None


def _logs(
    logits: torch.Tensor, teacher: torch.Tensor, delta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ln p, ln q and ln(delta p + (1 - delta) q)."""
    log_p = torch.log_softmax(logits.to(dtype), 1)
    log_q = torch.log_softmax(teacher.to(dtype), 1)
    if delta == 1:
        return log_p, log_q, log_p
    return log_p, log_q, torch.logaddexp(log_p + math.log(delta), log_q + math.log1p(-delta))


def _log(values: torch.Tensor) -> torch.Tensor:
    return values.clamp_min(torch.finfo(values.dtype).tiny).log()


def _parts(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))
