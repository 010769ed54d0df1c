"""Without a GPU the kernels run in Triton's interpreter; this must be said before Triton is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def kernels(device: torch.device) -> Iterator[None]:
    """Let functional forms take the Triton path: on the GPU, or in the interpreter."""
    from graftwork_kernels.dispatch import interpreting

    if device.type == "cuda":
        yield
    else:
        with interpreting():
            yield
