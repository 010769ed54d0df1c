"""Tiny models with an adapter that does something: B, the gates' weights and the components are not at their start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.testing.adapters import adapted_tiny, tiny_batch
from graftwork.testing.data import tiny_stream
from graftwork.testing.models import tiny_checkpoint
from graftwork_sparta import SpartaConfig
from peft import PeftModel


def _scramble(model: torch.nn.Module, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "sparta_" not in name or not parameter.requires_grad:
            continue
        with torch.no_grad():
            if "_B." in name or "router" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((2.0 if "router_w" in name else 0.2) * noise.to(parameter.dtype))


def _adapt(
    kind: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    scrambled: bool = True,
    model: dict[str, Any] | None = None,
    **fields: Any,
) -> PeftModel:
    torch.manual_seed(3)
    fields = {"rank_shared": 2, "rank_specific": 4, "block_layers": 2, "components": 3, **fields}
    adapted = adapted_tiny(SpartaConfig(task_type="CAUSAL_LM", **fields), kind, dtype=dtype, **(model or {}))
    if scrambled:
        _scramble(adapted)
    return adapted


@pytest.fixture(scope="session")
def adapt() -> Callable[..., PeftModel]:
    """``adapt(kind, dtype=, scrambled=, model={}, **config fields)`` returns an adapted tiny model."""
    return _adapt


@pytest.fixture(scope="session")
def scramble() -> Callable[..., None]:
    """``scramble(model)`` moves what trains away from its start."""
    return _scramble


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return tiny_batch()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stream(tmp_path_factory.mktemp("data") / "stream", ["fruit", "metal"], train=16, test=2)
