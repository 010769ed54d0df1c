"""What a user may say about CaLE."""

from __future__ import annotations

from typing import Literal

from graftwork.evaluate.qa import TemplateOptions
from pydantic import BaseModel, ConfigDict, Field, model_validator

from graftwork_cale.choose import STRENGTHS, Criterion
from graftwork_cale.enhance import Variant
from graftwork_cale.positions import Streams, Where


class CaleOptions(BaseModel):
    """Options of the plugin: a ``config``, or a layer and a strength; what is given wins over the config."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    config: str | None = Field(None, description="a cale.json that the benchmark cale:layers wrote")
    layer: int | Literal["every"] | None = Field(
        None, description="layer to enhance, 1 to L-1; every: all of them, for comparison"
    )
    strength: float | None = Field(None, gt=0, description="factor of the layer's output; 1 changes nothing")
    variant: Variant | None = Field(
        None,
        description="amplify the output (where neither is set), grow the layer's update, or add the output "
        "before the final norm (residual)",
    )
    positions: Where | None = Field(
        None,
        description="predicting: the prompt's last token and all new ones (where neither is set); or all",
    )
    streams: Streams = Field(
        "main", description="rows to enhance where a combiner decodes a second prompt: main or both"
    )

    @model_validator(mode="after")
    def _complete(self) -> CaleOptions:
        if self.config is None and (self.layer is None) != (self.strength is None):
            missing = "layer" if self.layer is None else "strength"
            raise ValueError(f"{missing} is missing: give layer and strength, or a config")
        if self.config is None and self.layer is None:
            for field in ("variant", "positions"):
                if getattr(self, field) is not None:
                    raise ValueError(f"{field} needs a layer and a strength, or a config")
        return self

    @property
    def given(self) -> bool:
        """Return whether there is something to enhance."""
        return self.config is not None or self.layer is not None


class LayersOptions(BaseModel):
    """Options of the benchmark ``cale:layers``."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    data: str = Field(description="JSONL file of questions with contexts, in a layout that qa reads")
    documents: Literal["counterfactual", "true"] = Field(
        "counterfactual", description="which of two contexts is given, where the file has both"
    )
    limit: int | None = Field(64, ge=1, description="so many questions; null takes all")
    offset: int = Field(0, ge=0, description="leave out the first so many questions")
    criterion: Criterion = Field(
        "growth",
        description="choose the layer where the context's effect grows most, where it is largest (peak), or "
        "by the F1 of every layer (supervised)",
    )
    variant: Variant = Field("amplify", description="what is done to a layer")
    strengths: list[float] = Field(
        list(STRENGTHS), min_length=1, description="strengths to try; 1 (off) always takes part"
    )
    score: bool = Field(
        True,
        description="off: answer nothing; the layer is by divergence and the strength the only one given",
    )
    positions: Where = Field("predicting", description="which positions are enhanced")
    templates: TemplateOptions = Field(default_factory=lambda: TemplateOptions.model_validate({}))
    chat: bool | None = Field(
        None, description="ask through the chat template; where not set, when the tokenizer has one"
    )
    batch_size: int = Field(8, ge=1, description="questions that are measured together")
    rows: int = Field(64, ge=1, description="settings times questions that are answered together")
    max_new_tokens: int = Field(16, ge=1, description="longest answer of a scored setting")

    @model_validator(mode="after")
    def _decidable(self) -> LayersOptions:
        if any(strength <= 0 for strength in self.strengths):
            raise ValueError(f"strengths = {self.strengths}: each must be greater than 0")
        if not self.score and self.criterion == "supervised":
            raise ValueError("criterion: supervised needs score: true")
        if not self.score and len(self.strengths) != 1:
            raise ValueError(
                f"without scoring, {len(self.strengths)} strengths cannot be told apart; give one, such as [1.25]"
            )
        return self
