"""The section ``transform:`` of a job: calibration and evaluation texts, memory, and what is written."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from graftwork.merge.options import MergeOptions

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB|KB|MB|GB|TB)", re.IGNORECASE)
_UNITS = {"b": 0, "k": 1, "m": 2, "g": 3, "t": 4}
RANDOM = "random"
"""Tokens drawn from the vocabulary, for smoke runs and tests."""


class TransformOptions(BaseModel):
    """How a model's weights are changed."""

    model_config = ConfigDict(extra="forbid")

    calibration: str | None = Field(
        None,
        min_length=1,
        description="text or JSONL file whose windows show what the layers get as inputs; or random",
    )
    samples: int = Field(128, ge=1, description="calibration windows, drawn with the seed")
    window: int = Field(2048, ge=2, description="tokens per calibration window")
    evaluation: list[str] = Field(
        [], description="texts whose perplexity is taken before and after, in the same pass; or random"
    )
    evaluation_window: int = Field(2048, ge=2, description="tokens per evaluation window")
    evaluation_windows: int | None = Field(
        None, ge=1, description="use the first so many windows of each text"
    )
    score_calibration: bool = Field(
        False, description="score the calibration windows afterwards, too: the difference shows overfitting"
    )
    overlap: Literal["refuse", "allow"] = Field(
        "refuse",
        description="what to do where calibration and evaluation share more than 1 % of their 13-grams",
    )
    batch_size: int = Field(4, ge=1, description="windows that go through a layer together")
    memory: str | None = Field(
        None,
        description="bound on this process's memory, such as 8GiB; kept to, or refused before anything is read",
    )
    activations: Literal["auto", "memory", "disk"] = Field(
        "auto",
        description="where hidden states are between layers; auto: in memory unless the bound forbids it",
    )
    format: Literal["auto", "dense", "compressed-tensors", "graftwork"] = Field(
        "auto",
        description="auto: compressed-tensors where it can hold the result, else graftwork's own; dense: rounded "
        "values in plain tensors, for any runtime",
    )
    experts: dict[str, str] = Field(
        {}, description="name: model or LoRA adapter that was made from this model, for plugins that merge"
    )
    merge: MergeOptions = Field(default_factory=lambda: MergeOptions.model_validate({}))
    deepspeed: str | dict[str, Any] | None = Field(
        None,
        description="DeepSpeed config with ZeRO-3: layers are gathered from it instead of read from files",
    )

    @field_validator("evaluation", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("memory", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        if value is not None and (not isinstance(value, str) or not _SIZE.fullmatch(value.strip())):
            raise ValueError(f"'{value}' is no size; write it as 8GiB or 800MB")
        return value

    @property
    def memory_bytes(self) -> int | None:
        """The bound in bytes."""
        match = _SIZE.fullmatch(self.memory.strip()) if self.memory else None
        if match is None:
            return None
        unit = match[2].lower()
        base = 1024 if "i" in unit else 1000
        return int(float(match[1]) * base ** _UNITS[unit[0]])
