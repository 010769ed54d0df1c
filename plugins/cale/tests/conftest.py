"""Tiny models whose layers say something: wider initial weights than usual, and a small epsilon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graftwork.testing.models import tiny_model
from transformers import PreTrainedModel

LLAMA_LIKE = ("llama", "mistral", "qwen2")
KINDS = (*LLAMA_LIKE, "gpt2")


def _lively(kind: str = "llama", **changes: Any) -> PreTrainedModel:
    depth = {"n_layer": 4} if kind == "gpt2" else {"num_hidden_layers": 4}
    small = {"layer_norm_epsilon": 1e-12} if kind == "gpt2" else {"rms_norm_eps": 1e-12}
    return tiny_model(kind, **{**depth, **small, "initializer_range": 0.3, **changes})


@pytest.fixture(scope="session")
def lively() -> Callable[..., PreTrainedModel]:
    """``lively(kind, **changes)``: a random model of four layers that all change what it predicts."""
    return _lively


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(20, 32)[None]
