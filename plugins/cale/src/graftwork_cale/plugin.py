"""The hooks of CaLE."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from graftwork import Benchmark, ForwardPass, UserError, hookimpl

from graftwork_cale.benchmarks import layers_benchmark, no_harm_benchmark
from graftwork_cale.choice import Enhanced, resolve
from graftwork_cale.config import read_config
from graftwork_cale.options import CaleOptions

if TYPE_CHECKING:
    from graftwork.run import Run
    from transformers import PreTrainedModel


class Cale:
    """Strengthen the layer that says most about the context, inside the forward pass."""

    Options = CaleOptions
    tiny: ClassVar[dict[str, Any]] = {"layer": 1, "strength": 8.0, "streams": "both"}
    neutral: ClassVar[dict[str, Any]] = {"layer": 1, "strength": 1.0}

    def __init__(self, options: CaleOptions) -> None:
        self.options = options
        self.active: list[Enhanced] = []
        self._said_off = False

    @hookimpl
    def check(self, run: Run) -> None:
        measures = str((run.job.benchmark or {}).get("name", "")).startswith("cale:")
        if not self.options.given and not measures:
            raise UserError(_NOTHING)
        if self.options.config is not None:
            read_config(self.options.config)

    @hookimpl
    def generation_context(self, run: Run, model: PreTrainedModel) -> AbstractContextManager[Any]:
        options = self.options
        if options.config is not None and options.strength is None and not self._said_off:
            self._said_off = True
            if read_config(options.config).off:
                run.console.say(f"plugin 'cale' does nothing: '{options.config}' says off")
        return self.enhanced(model)

    @hookimpl
    def before_forward(self, run: Run, coming: ForwardPass) -> None:
        for enhanced in self.active:
            enhanced.before_forward(coming)

    @hookimpl
    def benchmarks(self, run: Run) -> Mapping[str, Benchmark]:
        return {"layers": layers_benchmark(), "no-harm": no_harm_benchmark(self)}

    @contextlib.contextmanager
    def enhanced(self, model: Any, **changes: Any) -> Iterator[None]:
        """Enhance ``model`` as the options say; ``changes`` overrule them.

        Raises:
            UserError: nothing was chosen, or it does not fit the model.
        """
        if not self.options.given:
            raise UserError(_NOTHING)
        with resolve(self.options.model_copy(update=changes), model) as enhanced:
            self.active.append(enhanced)
            try:
                yield
            finally:
                self.active.remove(enhanced)


_NOTHING = (
    "plugin 'cale' does not know which layer to enhance; set plugins.cale.config to a cale.json "
    "(`trainer evaluate --benchmark cale:layers` writes one), or plugins.cale.layer and plugins.cale.strength"
)
