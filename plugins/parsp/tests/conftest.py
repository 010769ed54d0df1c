"""Tiny models with a PaRSP adapter in the middle of a stream: something learned before, a region that trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.testing.adapters import adapted_tiny, tiny_batch
from graftwork.testing.data import tiny_stream
from graftwork.testing.models import tiny_checkpoint
from graftwork_parsp import ParspConfig, begin_region, find_mlps, fold, top_directions
from graftwork_parsp.model import layers_of
from peft import PeftModel


def _learn(model: torch.nn.Module, seed: int, scale: float = 0.1) -> None:
    """Put numbers where training would have."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "parsp_theta" in name and parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def _region(model: torch.nn.Module, seed: int, count: int, k: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    mlps = find_mlps(model)
    cores = {mlp.name: torch.randperm(mlp.neurons, generator=generator)[:count] for mlp in mlps}
    data = {mlp.name: torch.randn(k, mlp.inputs, generator=generator).double() for mlp in mlps}
    bases = {name: top_directions(x.T @ x, 0.0) for name, x in data.items()}
    columns = {mlp.name: torch.randn(2, count, generator=generator).double() for mlp in mlps}
    column_bases = {name: top_directions(x.T @ x, 0.0) for name, x in columns.items()}
    begin_region(model, cores, bases, column_bases=column_bases, seed=seed)


def _adapt(
    kind: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    learned: bool = True,
    model: dict[str, Any] | None = None,
    **fields: Any,
) -> PeftModel:
    fields = {"density": 0.25, **fields}
    adapted = adapted_tiny(ParspConfig(**fields), kind, dtype=dtype, **(model or {}))
    if learned:
        _region(adapted, 1, 12)
        _learn(adapted, 2)
        fold(adapted)
        _region(adapted, 3, 9)
        _learn(adapted, 4)
    assert layers_of(adapted)
    return adapted


@pytest.fixture(scope="session")
def adapt() -> Callable[..., PeftModel]:
    """``adapt(kind, dtype=, learned=, model={}, **config fields)`` returns an adapted tiny model."""
    return _adapt


@pytest.fixture(scope="session")
def learn() -> Callable[..., None]:
    """``learn(model, seed)`` moves what trains."""
    return _learn


@pytest.fixture(scope="session")
def region() -> Callable[..., None]:
    """``region(model, seed, count, k=)`` begins a region of drawn neurons and directions."""
    return _region


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return tiny_batch()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stream(tmp_path_factory.mktemp("data") / "stream", ["fruit", "metal"], train=16, test=2)
