"""Tiny models with outlier channels, grouped queries and tied embeddings; engines on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graftwork.testing.models import tiny_model
from transformers import PreTrainedModel

# 9 query and 3 key/value heads, as SmolLM2 has them; 36 = 4 x 9 has no large Hadamard matrix, 48 = 4 x 12 has one.
SHAPE = {
    "hidden_size": 144,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "intermediate_size": 192,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}


def _make(seed: int = 0, *, outliers: bool = True, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a random llama whose norms let a few channels through many times larger."""
    model = tiny_model(seed=seed, dtype=dtype, **{**SHAPE, **changes})
    if outliers:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in model.model.layers:
                for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                    size = norm.weight.shape[0]
                    norm.weight.copy_((0.5 * torch.randn(size, generator=generator)).exp())
                    norm.weight[torch.randperm(size, generator=generator)[:3]] *= 20
    return model


@pytest.fixture(scope="session")
def make() -> Callable[..., PreTrainedModel]:
    """``make(seed, outliers=..., **changes)``: a random llama, its inputs with outlier channels."""
    return _make


@pytest.fixture
def ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, 259, (6, 24), generator=generator)
