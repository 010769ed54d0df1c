"""The hooks of DEM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

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
    # A random model's sites say little and its inputs are few: any site, and a ridge that is felt.
    tiny: ClassVar[dict[str, Any]] = {
        "requests": "facts",
        "limit": 2,
        "max_share": 1e6,
        "ridge": 1e-2,
        "locate": {"mode": "fixed", "sites": ["mlp.1", "attn.2"]},
    }

    @classmethod
    def editor(cls, options: Any) -> DemEditor:
        return DemEditor(options)

    @hookimpl
    def benchmarks(self, run: Run) -> Mapping[str, Benchmark]:
        return {**super().benchmarks(run), "localization": localization_benchmark()}
