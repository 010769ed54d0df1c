"""Learning diagonals: Adam on their logarithms, and of all that was tried the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from graftwork_dam.adhesive import LIMIT, normalised


@dataclass(frozen=True)
class Learned:
    """What came of it.

    Attributes:
        logs: the diagonals' logarithms, each normalised.
        loss: of these; never above ``initial``.
        initial: of the start.
        finite: whether every loss and gradient was a number. Where one was not, learning ended there.
    """

    logs: list[torch.Tensor]
    loss: float
    initial: float
    finite: bool


def learn(
    loss: Callable[[Sequence[torch.Tensor]], torch.Tensor],
    start: Sequence[torch.Tensor],
    *,
    steps: int,
    lr: float,
) -> Learned:
    """Return the best of ``start`` and ``steps`` iterates of Adam by ``loss``, a function of the logarithms."""
    logs = [one.detach().clone().requires_grad_() for one in start]
    optimizer = torch.optim.Adam(logs, lr=lr)
    with torch.no_grad():
        initial = loss(logs).item()
    best, kept, finite = initial, [one.detach().clone() for one in logs], True
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            now = loss(logs)
        if not bool(torch.isfinite(now)):
            finite = False
            break
        if now.item() < best:
            best, kept = now.item(), [one.detach().clone() for one in logs]
        if step == steps:
            break
        optimizer.zero_grad()
        now.backward()
        if not all(one.grad is None or bool(torch.isfinite(one.grad).all()) for one in logs):
            finite = False
            break
        optimizer.step()
        with torch.no_grad():
            for one in logs:
                one.copy_(one.mean() + (one - one.mean()).clamp(-LIMIT, LIMIT))
    return Learned([normalised(one) for one in kept], best, initial, finite)
