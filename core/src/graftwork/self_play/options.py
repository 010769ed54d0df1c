"""What every method of self-play may be told; a plugin's options inherit these."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class WritingOptions(BaseModel):
    """How players write their answers."""

    model_config = ConfigDict(extra="forbid")

    backend: Literal["transformers", "vllm"] = Field(
        "transformers", description="batched generate in this process, or a vLLM server through TRL's client"
    )
    server: str = Field("http://localhost:8000", description="address of the vLLM server")
    max_new_tokens: int = Field(256, ge=1, description="longest answer in tokens")
    temperature: float = Field(1.0, ge=0, description="of the samples; 0: greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus of the samples")
    batch_size: int = Field(16, ge=1, description="prompts that are answered together")
    template: str | None = Field(
        None,
        description="text that a prompt is put into, at {prompt}, when an answer is written (training keeps the "
        "data's own form); the data's own form where not set",
    )

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, value: str | None) -> str | None:
        if value is not None and "{prompt}" not in value:
            raise ValueError("holds {prompt}, where the prompt goes")
        return value


class SelfPlayOptions(BaseModel):
    """What the core carries out for a method of self-play."""

    model_config = ConfigDict(extra="forbid")

    iterations: int = Field(4, ge=1, description="rounds of writing and training")
    writing: WritingOptions = Field(default_factory=lambda: WritingOptions.model_validate({}))
    team: list[str] = Field(
        [],
        description="older checkpoints of the same base to begin with, the oldest first: run, adapter or model "
        "folders",
    )
    truncated: Literal["keep", "drop"] = Field(
        "keep",
        description="answers cut at max_new_tokens: train on them, without an end that was not written; or not",
    )
    identical: Literal["keep", "drop"] = Field(
        "keep",
        description="written answers that are the target, word for word, from which nothing is learned",
    )
