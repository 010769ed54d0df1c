"""The PyTorch path of :mod:`graftwork_kernels.selected_log_probs`: blocks of logits that stay in a CPU's cache.

Shapes: N tokens, D width, V words; hidden is N x D, weight V x D, labels N, bias V.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Of a block of logits; 4 MiB in float32 stay in the cache between the passes over them.
ROWS, COLUMNS = 512, 2048
# exp of it is 0 in float64, and times 0 it is no NaN.
FLOOR = -1000.0


def exact(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums."""
    return torch.promote_types(dtype, torch.float32)


class _Blocks:
    """Logits of some rows and some words at a time, always in the same memory."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.hidden, self.weight = hidden, weight
        self.sums = exact(hidden.dtype)
        self.bias = None if bias is None else bias.to(self.sums)
        size = min(ROWS, len(hidden)) * min(COLUMNS, len(weight))
        self.low = hidden.new_empty(size)
        self.same = hidden.dtype == self.sums
        self.room = self.low if self.same else hidden.new_empty(size, dtype=self.sums)

    def rows(self) -> Iterator[slice]:
        return _slices(len(self.hidden), ROWS)

    def columns(self) -> Iterator[slice]:
        return _slices(len(self.weight), COLUMNS)

    def logits(self, rows: slice, columns: slice) -> torch.Tensor:
        """Return the logits of a block; the next call writes over them."""
        hidden, weight = self.hidden[rows], self.weight[columns]
        shape = len(hidden), len(weight)
        found = self.room[: shape[0] * shape[1]].view(shape)
        if self.same:
            torch.mm(hidden, weight.T, out=found)
        else:
            low = self.low[: found.numel()].view(shape)
            found.copy_(torch.mm(hidden, weight.T, out=low))
        return found if self.bias is None else found.add_(self.bias[columns])

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """Return ``values`` in the dtype of products; the next logits write over them."""
        return values if self.same else self.low[: values.numel()].view(values.shape).copy_(values)


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _chosen(labels: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where each label (n x 1) stands in a block of words, and whether it does."""
    local = labels[:, None] - columns.start
    last = columns.stop - columns.start - 1
    return local.clamp(0, last), (local >= 0) & (local <= last)


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    entropies: bool,
    direction: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probabilities, entropies, log-sum-exps (N) and the direction (N x D); empty what is not asked for."""
    blocks = _Blocks(hidden, weight, bias)
    count, width = hidden.shape
    labels = labels.long()
    selected = hidden.new_empty(count, dtype=blocks.sums)
    normaliser = torch.empty_like(selected)
    entropy = selected.new_empty(count if entropies else 0)
    towards = selected.new_empty(count if direction else 0, width)
    for rows in blocks.rows():
        size = (rows.stop - rows.start, 1)
        largest, picked = selected.new_full(size, -torch.inf), selected.new_full(size, torch.nan)
        total, moment = selected.new_zeros(size), selected.new_zeros(size)
        weighed = towards[rows].zero_()
        for columns in blocks.columns():
            z = blocks.logits(rows, columns)
            local, inside = _chosen(labels[rows], columns)
            picked = torch.where(inside, z.gather(1, local), picked)
            now = torch.maximum(largest, z.amax(1, keepdim=True))
            # Where all so far is -inf nothing may be subtracted: -inf - -inf is no number.
            origin = torch.where(now == -torch.inf, 0.0, now)
            step = (largest - origin).clamp(FLOOR, 0.0)
            factor = step.exp()
            z.sub_(origin)
            if entropies:
                z.clamp_min_(FLOOR)
                raised = z.exp()
                moment = factor * (moment + step * total) + torch.linalg.vecdot(raised, z)[:, None]
            else:
                raised = z.exp_()
            total = factor * total + raised.sum(1, keepdim=True)
            if direction:
                weighed.mul_(factor)
                _add_product(weighed, blocks.rounded(raised), weight[columns])
            largest = now
        log_total = total.log()
        normaliser[rows] = (largest + log_total).squeeze(1)
        selected[rows] = picked.squeeze(1) - normaliser[rows]
        if entropies:
            entropy[rows] = (log_total - moment / total).squeeze(1)
        if direction:
            weighed.div_(total).neg_().add_(weight[labels[rows]])
    return selected, entropy, normaliser, towards


def backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    normaliser: torch.Tensor,
    entropy: torch.Tensor,
    of_selected: torch.Tensor,
    of_entropy: torch.Tensor | None,
    wanted: list[bool],
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Write those gradients of hidden states, weight and bias into ``found`` that are ``wanted``."""
    blocks = _Blocks(hidden, weight, bias)
    of_hidden, of_weight, of_bias = found
    labels = labels.long()
    if not len(hidden):
        of_weight.zero_()
    # Sums are exact and rounded once; where that is the gradient's own dtype they stand in it from the start.
    of_rows = of_hidden if blocks.same else torch.empty_like(of_hidden, dtype=blocks.sums)
    of_words = (
        of_weight
        if blocks.same
        else of_weight.new_empty(min(COLUMNS, len(weight)), hidden.shape[1], dtype=blocks.sums)
    )
    for columns in blocks.columns():
        size = columns.stop - columns.start
        of_block = of_words[columns] if blocks.same else of_words[:size]
        of_bias_block = hidden.new_zeros(size, dtype=blocks.sums)
        for rows in blocks.rows():
            z = blocks.logits(rows, columns).sub_(normaliser[rows, None])
            given = of_selected[rows, None].to(blocks.sums)
            if of_entropy is None:
                of_logits = z.exp_().mul_(-given)
            else:
                log_p = z.clamp_min_(FLOOR)
                slope = (log_p + entropy[rows, None]).mul_(of_entropy[rows, None]).add_(given)
                of_logits = log_p.exp_().mul_(slope).neg_()
            local, inside = _chosen(labels[rows], columns)
            of_logits.scatter_add_(1, local, torch.where(inside, given, 0.0))
            if wanted[2]:
                of_bias_block += of_logits.sum(0)
            of_logits = blocks.rounded(of_logits)
            if wanted[1]:
                _add_product(of_block, of_logits.T, hidden[rows], first=rows.start == 0)
            if wanted[0]:
                _add_product(of_rows[rows], of_logits, weight[columns], first=columns.start == 0)
        if wanted[1] and not blocks.same and len(hidden):
            of_weight[columns] = of_block
        if wanted[2]:
            of_bias[columns] = of_bias_block
    if wanted[0] and not blocks.same:
        of_hidden.copy_(of_rows)


def _add_product(
    target: torch.Tensor, one: torch.Tensor, other: torch.Tensor, *, first: bool = False
) -> None:
    """Add ``one @ other`` to ``target``, which is in the dtype of sums; put it there where it is the ``first``."""
    if target.dtype == one.dtype:
        target.addmm_(one, other, beta=0 if first else 1)
    elif first:
        target.copy_(one @ other)
    else:
        target += one @ other
