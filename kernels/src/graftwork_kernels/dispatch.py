"""Which path a call takes: Triton on a GPU (CUDA, or ROCm where Triton runs), PyTorch everywhere else.

With ``TRITON_INTERPRET=1``, set before Triton is imported, kernels run on CPU tensors inside
:func:`interpreting`: right, but slow. That is for testing them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Whether Triton was told to interpret: what is compiled for a GPU then is not.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
_interpreting = False


def fused(*tensors: torch.Tensor) -> bool:
    """Return whether kernels run for these tensors: all on a GPU, or on any device while interpreting."""
    if INTERPRETED:
        return _interpreting
    return HAS_TRITON and all(tensor.is_cuda for tensor in tensors)


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Run kernels in Triton's interpreter inside, where there is no GPU.

    Raises:
        RuntimeError: Triton is missing, or was imported without ``TRITON_INTERPRET=1``.
    """
    global _interpreting
    if not INTERPRETED:
        raise RuntimeError("set TRITON_INTERPRET=1 before Triton is imported to run kernels without a GPU")
    before, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = before


def path_of(device: torch.device | str) -> str:
    """Return in words which path calls take on ``device``."""
    device = torch.device(device)
    if not HAS_TRITON:
        return "PyTorch (Triton is not installed)"
    version = importlib.metadata.version("triton")
    if INTERPRETED and _interpreting:
        return f"Triton {version}, interpreted on {device.type}: for tests only"
    if INTERPRETED or device.type != "cuda":
        return f"PyTorch on {device.type} (Triton kernels run on GPUs)"
    return f"Triton {version} on {torch.cuda.get_device_name(device)}"


_SAID: set[str] = set()


def announce(say: Callable[[str], None], device: torch.device | str) -> None:
    """Say once per process and device which path runs."""
    text = f"kernels: {path_of(device)}"
    if text not in _SAID:
        _SAID.add(text)
        say(text)
