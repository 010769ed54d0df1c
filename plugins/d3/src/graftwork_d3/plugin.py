"""The hooks of D3."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from graftwork import Benchmark, ForwardPass, hookimpl
from graftwork.models import load_config

from graftwork_d3.benchmarks import BENCHMARKS
from graftwork_d3.controller import DepthController
from graftwork_d3.flops import Cost, cost_of
from graftwork_d3.options import D3Options, schedule_for
from graftwork_d3.report import DepthReport
from graftwork_d3.stack import check_removable, find_decoder, layer_count

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from graftwork.run import Run
    from transformers import PreTrainedModel


class D3:
    """Let later tokens of an answer pass through fewer layers.

    ``report`` counts what was decoded so far, None before anything was.
    """

    Options = D3Options
    tiny: ClassVar[dict[str, Any]] = {"alpha": 0.5, "flex_start": 1, "tail": 1, "minimum": 2}
    neutral: ClassVar[dict[str, Any]] = {"alpha": 1.0}

    def __init__(self, options: D3Options) -> None:
        self.options = options
        self.report: DepthReport | None = None
        self._active: DepthController | None = None
        self._cost: Cost | None = None

    @hookimpl
    def check(self, run: Run) -> None:
        source = run.job.model
        config = load_config(source.ref, inline=source.config, trust_remote_code=source.trust_remote_code)
        check_removable(config, schedule_for(self.options, layer_count(config)).removable)

    @hookimpl
    def generation_context(self, run: Run, model: PreTrainedModel) -> AbstractContextManager[Any]:
        return self._decoding(model)

    @hookimpl
    def before_forward(self, run: Run, coming: ForwardPass) -> None:
        if self._active is not None:
            self._active.step(coming.step)

    @hookimpl
    def generation_notes(self, run: Run) -> list[str] | None:
        return [self.report.sentence(self._cost)] if self.report and self._cost else None

    @hookimpl
    def benchmarks(self, run: Run) -> Mapping[str, Benchmark]:
        return BENCHMARKS

    @contextlib.contextmanager
    def _decoding(self, model: Any) -> Iterator[DepthController]:
        _, layers = find_decoder(model)
        self._cost = cost_of(model)
        controller = DepthController(model, schedule_for(self.options, len(layers)))
        with controller:
            self._active = controller
            try:
                yield controller
            finally:
                self._active = None
                if self.report is None or self.report.plan != controller.plan:
                    self.report = controller.report
                else:
                    self.report.add(controller.report)
