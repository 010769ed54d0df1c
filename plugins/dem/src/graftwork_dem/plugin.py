"""The hooks of DEM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from graftwork import Benchmark, hookimpl
from graftwork.edit.plugin import EditPlugin

from graftwork_dem.editor import DemEditor
from graftwork_dem.localization import localization_benchmark
from graftwork_dem.settings import DemOptions

if TYPE_CHECKING:
    from graftwork.run import Run


class Dem(EditPlugin):
    """Editing sentences of common sense at places that are found for each."""

    name = "dem"
    Options = DemOptions

    @classmethod
    def editor(cls, options: Any) -> DemEditor:
        return DemEditor(options)

    @hookimpl
    def benchmarks(self, run: Run) -> Mapping[str, Benchmark]:
        return {**super().benchmarks(run), "localization": localization_benchmark()}
