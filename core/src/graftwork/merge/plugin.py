"""What plugins that merge have in common: the transform and the retention benchmark of their method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from graftwork.hookspecs import Benchmark, WeightTransform, hookimpl
from graftwork.merge.method import MergeMethod
from graftwork.merge.transform import merge_transform

if TYPE_CHECKING:
    from graftwork.run import Run


class ExpandOptions(BaseModel):
    """The option of every merge that can stand for one expert."""

    model_config = ConfigDict(extra="forbid")

    expand: str | None = Field(None, description="write the model that stands for this expert")


class MergePlugin:
    """A plugin made of a merge method; subclasses set ``name`` and ``Options`` and make the method.

    The options may have a field ``expand``; see :class:`ExpandOptions`.
    """

    name: str
    Options: type[BaseModel] = ExpandOptions

    def __init__(self, options: Any) -> None:
        self.options = options

    @classmethod
    def method(cls, options: Any, seed: int) -> MergeMethod:
        """Return the method with these options; ``seed`` of the run, for those that draw."""
        raise NotImplementedError

    @hookimpl
    def weight_transforms(self, run: Run) -> Sequence[WeightTransform]:
        expand = getattr(self.options, "expand", None)
        return [merge_transform(run, self.name, self.method(self.options, run.seed), expand=expand)]

    @hookimpl
    def benchmarks(self, run: Run) -> Mapping[str, Benchmark]:
        from graftwork.merge.retention import retention_benchmark

        return {"retention": retention_benchmark(run, self.options, self.method)}
