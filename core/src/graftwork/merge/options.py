"""The section ``transform.merge`` of a job: how experts are read and what of them is merged."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class MergeOptions(BaseModel):
    """How experts are matched with the base, and what of them is merged."""

    model_config = ConfigDict(extra="forbid")

    embeddings: Literal["keep", "merge"] = Field(
        "keep", description="token embeddings and head: the base's own, or merged like all else"
    )
    missing: Literal["error", "base"] = Field(
        "error", description="a tensor that an expert lacks: refuse, or take the base's"
    )
    extra: Literal["error", "ignore"] = Field(
        "error", description="tensors of a text expert that the base lacks: refuse, or leave them out"
    )
    vocab: Literal["error", "crop"] = Field(
        "error",
        description="an expert with more tokens than the base: refuse, or take the base's tokens only",
    )
    prefix: dict[str, str] = Field(
        {}, description="expert: what stands before the language model's tensor names; found where not set"
    )
    rows: int | None = Field(
        None, ge=1, description="rows of a matrix that are merged at a time; by default as fit into the cache"
    )
