"""A loaded base model that stands for others for a while: its weights are merged in place and then put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from graftwork.console import Console
from graftwork.merge.experts import Experts
from graftwork.merge.method import MergeMethod
from graftwork.merge.threads import one_thread
from graftwork.merge.transform import applied


class Standing:
    """The base in memory, with a copy of its merged weights.

    Args:
        model: the base as it is stored, on any device; it has the parameters that the experts are merged into.
        experts: opened with the same base.
    """

    def __init__(self, model: Any, experts: Experts) -> None:
        self.model, self.experts = model, experts
        parameters = dict(model.named_parameters())
        self._parameters = {name: parameters[name].data for name in experts.shapes}
        self._own = {name: value.to("cpu", copy=True) for name, value in self._parameters.items()}

    @contextlib.contextmanager
    def showing(self, method: MergeMethod, index: int | None, console: Console) -> Iterator[Any]:
        """Yield the merged model (``index`` None) or the one that stands for an expert; then it is the base again.

        ``method`` has begun.
        """
        experts = self.experts
        try:
            with one_thread(), console.bar(experts.count, "merge", "weight") as bar:
                for name, shape in experts.shapes.items():
                    target, own = self._parameters[name].view(shape), self._own[name].view(shape)
                    for rows in experts.tiles(name):
                        piece, stored = experts.read(name, rows)
                        delta = method.merge(piece) if index is None else method.expert(piece, index)
                        target[rows].copy_(applied(piece, stored, delta, own[rows]))
                        bar.update(piece.base.numel())
            yield self.model
        finally:
            for name, value in self._own.items():
                self._parameters[name].copy_(value)
