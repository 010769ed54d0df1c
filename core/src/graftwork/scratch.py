"""A model to train from scratch: a small llama with random weights and a byte-level tokenizer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from graftwork.files import made_once
from graftwork.inline_settings import read_settings


class ScratchOptions(BaseModel):
    """The shape of the model, in the names of its config, and the seed of its weights; 5 million by default."""

    model_config = ConfigDict(extra="forbid")

    hidden_size: int = Field(256, ge=8, le=4096, description="width")
    num_hidden_layers: int = Field(6, ge=1, le=64, description="layers")
    num_attention_heads: int = Field(8, ge=1, le=128, description="heads; they divide the width")
    num_key_value_heads: int | None = Field(
        None, ge=1, le=128, description="heads of keys and values; as many as heads where not set"
    )
    intermediate_size: int = Field(704, ge=8, le=16384, description="width inside an MLP")
    max_position_embeddings: int = Field(1024, ge=16, le=32768, description="longest sequence, in bytes")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the random weights")

    @model_validator(mode="after")
    def _fits(self) -> ScratchOptions:
        heads, groups = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        # Rotary embeddings turn pairs of numbers.
        if self.hidden_size % (2 * heads):
            raise ValueError(
                f"hidden_size = {self.hidden_size} is no even multiple of num_attention_heads = {heads}"
            )
        if heads % groups:
            raise ValueError(
                f"num_attention_heads = {heads} is no multiple of num_key_value_heads = {groups}"
            )
        return self


def scratch_folder(text: str) -> Path:
    """Return the checkpoint of ``text``, the settings after ``scratch:``, made the first time.

    Raises:
        UserError: a setting is unknown, or its value makes no model.
    """
    options = read_settings(ScratchOptions, text, f"model 'scratch:{text}'")
    settings = options.model_dump()
    settings["num_key_value_heads"] = options.num_key_value_heads or options.num_attention_heads
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]

    def make(folder: Path) -> None:
        from graftwork.testing.models import tiny_model, tiny_tokenizer

        tiny_model("llama", **settings).save_pretrained(folder)
        tokenizer = tiny_tokenizer()
        tokenizer.model_max_length = options.max_position_embeddings
        tokenizer.save_pretrained(folder)

    return made_once(f"scratch-1-{key}", make)
