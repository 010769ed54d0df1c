"""The hooks of DAM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from graftwork import Benchmark, WeightTransform, hookimpl

from graftwork_dam.benchmark import additivity_benchmark
from graftwork_dam.compress import FIGURES, compress_block
from graftwork_dam.options import DamOptions

if TYPE_CHECKING:
    from graftwork.run import Run


class Dam:
    """Low rank and quantization together, with a diagonal between the factors."""

    Options = DamOptions
    tiny: ClassVar[dict[str, Any]] = {"scheme": "W4A16", "ratio": 0.9, "learn": {"steps": 3, "tokens": 256}}

    def __init__(self, options: DamOptions) -> None:
        self.options = options

    @hookimpl
    def weight_transforms(self, run: Run) -> Sequence[WeightTransform]:
        return [
            WeightTransform(
                "dam",
                partial(compress_block, options=self.options),
                factors=True,
                rounds=self.options.quantizer != "none",
                figures=FIGURES,
            )
        ]

    @hookimpl
    def benchmarks(self, run: Run) -> Mapping[str, Benchmark]:
        return {"additivity": additivity_benchmark(run.job.benchmark)}
