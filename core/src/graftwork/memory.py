"""Peak memory of this process, resettable between jobs."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from functools import cache
from pathlib import Path


def reset_peak() -> None:
    """Start a new peak where the system allows it (Linux, CUDA)."""
    # "5" resets the peak resident set size; see proc(5). Elsewhere the peak is the process's own.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    torch = _torch_with_cuda()
    if torch:
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """Return the peak since :func:`reset_peak`: of the GPU where there is one, else resident memory."""
    torch = _torch_with_cuda()
    if torch:
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back() -> None:
    """Return to the system what was freed: the allocators keep it, and between pieces of other sizes it adds up."""
    trim = getattr(_libc(), "malloc_trim", None)  # glibc's own; other allocators give back by themselves
    if trim is not None:
        trim(0)
    torch = _torch_with_cuda()
    if torch:
        torch.cuda.empty_cache()


def return_large_pieces() -> None:
    """Let pieces of 8 MiB and more go back to the system when they are freed, from now on (glibc).

    By itself glibc raises this limit to 32 MiB as large pieces are freed, and keeps what lies below.
    """
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 8 << 20)


_MMAP_THRESHOLD = -3
"""glibc's number for the size from which a piece has pages of its own; see mallopt(3)."""


@cache
def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None


def _torch_with_cuda():
    import torch

    return torch if torch.cuda.is_available() else None
