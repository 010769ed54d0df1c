"""The hooks of COIECD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from graftwork import Benchmark, Combiner, hookimpl
from graftwork_kernels import announce

from graftwork_coiecd.options import CoiecdOptions

if TYPE_CHECKING:
    from graftwork.run import Run
    from transformers import PreTrainedModel


class CoiecdPlugin:
    """Score tokens by how the context changes them, plausible ones more than others."""

    Options = CoiecdOptions
    neutral: ClassVar[dict[str, Any]] = {"alpha": 1.0, "ratio": 1.0}

    def __init__(self, options: CoiecdOptions) -> None:
        self.options = options

    @hookimpl
    def combiner(self, run: Run, model: PreTrainedModel) -> Combiner:
        method = self.options.method
        # A run that is only checked has nobody to tell.
        if run.console.enabled:
            announce(run.console.say, model.device)
        return Combiner("coiecd", method.scores, explain=method.explain)

    @hookimpl
    def benchmarks(self, run: Run) -> Mapping[str, Benchmark]:
        from graftwork_coiecd.steps import benchmark

        return {"steps": benchmark(self.options.method)}
