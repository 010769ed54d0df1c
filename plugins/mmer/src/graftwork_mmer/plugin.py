"""The plugin: the merge as a weight transform, expansion from stored masks, and two benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from graftwork import UserError
from graftwork.hookspecs import Benchmark, WeightTransform, hookimpl
from graftwork.merge.plugin import MergePlugin
from graftwork.merge.transform import merge_transform

from graftwork_mmer.expand import expansion_transform
from graftwork_mmer.method import MmerMethod
from graftwork_mmer.options import MmerOptions
from graftwork_mmer.sources import refuse_merged

if TYPE_CHECKING:
    from graftwork.run import Run


class Mmer(MergePlugin):
    """Merge, then mask: one merged difference and a bit per weight for each expert."""

    name = "mmer"
    Options = MmerOptions

    @classmethod
    def method(cls, options: MmerOptions, seed: int) -> MmerMethod:
        return MmerMethod(options)

    @hookimpl
    def check(self, run: Run) -> None:
        """Refuse experts that a merge has written."""
        transform = run.job.transform
        if transform is not None and not self.options.allow_merged:
            refuse_merged(transform.experts.items())

    @hookimpl
    def weight_transforms(self, run: Run) -> Sequence[WeightTransform]:
        options = self.options
        names = sorted(run.job.transform.experts) if run.job.transform is not None else []
        if options.artefact is not None:
            if names:
                raise UserError(
                    "mmer: expand from stored masks (plugins.mmer.artefact) or from experts (transform.experts), not "
                    "both"
                )
            return [expansion_transform(run, options.artefact, options.expand)]
        return [merge_transform(run, self.name, MmerMethod(options, names), expand=options.expand)]

    @hookimpl
    def benchmarks(self, run: Run) -> Mapping[str, Benchmark]:
        from graftwork_mmer.expansion.benchmark import expansion_benchmark

        return {**super().benchmarks(run), "expansion": expansion_benchmark(self.options)}
