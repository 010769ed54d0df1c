"""What a recipe's ``data:`` section may say."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DataOptions(BaseModel):
    """Where the tasks come from, in which order, how many items, and how an item is asked."""

    model_config = ConfigDict(extra="forbid")

    source: str = Field(
        description="task folder, JSONL file or folder, or <layout>:<path>, e.g. cl:olora:data/ or "
        "alpaca:items.json; exact:<kind> generates questions with one exact answer"
    )
    order: list[str] | None = Field(None, description="names of the tasks, in the order to learn them")
    train_items: int | None = Field(
        None, ge=1, description="at most so many training items per task, drawn by seed"
    )
    test_items: int | None = Field(
        None, ge=1, description="at most so many test items per task, drawn by seed"
    )
    validation: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="score on this share of the training items (16 at least), cut off by seed, and leave the "
        "test file unread: for tuning",
    )
    draw_seed: int | None = Field(None, ge=0, description="seed of the drawing; the run's seed where not set")
    max_words: int | None = Field(None, ge=1, description="keep the first so many words of a sentence")
    max_prompt_tokens: int | None = Field(
        None,
        ge=1,
        description="cut the end of a sentence until its whole prompt has at most so many tokens; a prompt that "
        "has no sentence loses its middle",
    )
    prompt: Literal["plain", "published", "chat"] = Field(
        "plain",
        description="plain: instruction, options, sentence; published: with the task's name in front, as the "
        "benchmark's scripts have it; chat: the plain prompt as a user message, the answer as the assistant's",
    )
    options_in_prompt: bool = Field(True, description="list the labels in the prompt")
    overlap: Literal["report", "refuse"] = Field(
        "report", description="what to do about test items that also stand in the training file"
    )
