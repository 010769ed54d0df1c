"""What plugins that edit have in common: options, the transform, and the benchmark of their method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from graftwork.edit.draft import MAX_SHARE
from graftwork.edit.editor import Editor
from graftwork.edit.layouts import read_requests
from graftwork.edit.transform import edit_transform
from graftwork.errors import UserError
from graftwork.hookspecs import Benchmark, WeightTransform, hookimpl

if TYPE_CHECKING:
    from graftwork.run import Run


class EditOptions(BaseModel):
    """The options of every editor."""

    model_config = ConfigDict(extra="forbid")

    requests: str | None = Field(
        None,
        min_length=1,
        description="JSONL file of edits, or counterfact:FILE, zsre:FILE, zsre-alt:FILE, facts (generated ones), "
        "or <module>:<function> of an installed package",
    )
    limit: int | None = Field(None, ge=1, description="so many requests; all if not set")
    offset: int = Field(0, ge=0, description="leave out the first so many requests")
    max_target_tokens: int = Field(64, ge=1, description="longest target")
    statistics: Literal["corpus", "identity"] = Field(
        "corpus", description="second moments of the calibration text, or the identity, a control"
    )
    statistics_tokens: int | None = Field(
        None, ge=1, description="tokens of the calibration text that are counted; all windows if not set"
    )
    max_share: float = Field(
        MAX_SHARE, gt=0, description="largest ||dW|| / ||W|| of a weight; more is refused"
    )


class EditPlugin:
    """A plugin made of an editor; subclasses set ``name`` and ``Options`` and make the editor."""

    name: str
    Options: type[EditOptions] = EditOptions
    tiny: ClassVar[dict[str, Any]] = {"requests": "facts", "limit": 2}

    def __init__(self, options: Any) -> None:
        self.options = options

    @classmethod
    def editor(cls, options: Any) -> Editor:
        """Return the editor with these options."""
        raise NotImplementedError

    @hookimpl
    def weight_transforms(self, run: Run) -> Sequence[WeightTransform]:
        options = self.options
        if options.requests is None:
            raise UserError(
                f"plugin '{self.name}' edits a model with requests, and none are named; set "
                f"plugins.{self.name}.requests=FILE"
            )
        editor = self.editor(options)
        identity = options.statistics == "identity"
        section = run.job.transform
        if editor.uses_statistics and not identity and (section is None or section.calibration is None):
            raise UserError(
                f"plugin '{self.name}' takes second moments of a text, and none is set; set "
                f"transform.calibration=FILE, or plugins.{self.name}.statistics=identity"
            )
        return [
            edit_transform(
                editor,
                read_requests(options.requests, limit=options.limit, offset=options.offset),
                identity=identity,
                tokens=options.statistics_tokens,
                max_target_tokens=options.max_target_tokens,
                max_share=options.max_share,
            )
        ]

    @hookimpl
    def benchmarks(self, run: Run) -> Mapping[str, Benchmark]:
        from graftwork.edit.benchmark import editing_benchmark

        return {"editing": editing_benchmark(self.name, self.options, self.editor)}
