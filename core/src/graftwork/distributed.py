"""The processes of one run: who is who, waiting for each other, and sums over all of them.

Every function also works in a single process, where torch.distributed is not initialised.
"""

from __future__ import annotations

from typing import Any

import torch


def active() -> bool:
    """Return whether several processes were started and have met."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def leave() -> None:
    """Part from the other processes before the interpreter ends.

    The threads of the gloo back end, still running when Python unloads, can abort a process that has done its
    work (seen now and then with torch 2.13). Call it only after work that succeeded: after an error of one
    process the others may still wait for it, and so would this.
    """
    if active():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """Return the number of this process and how many there are."""
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if active() else (0, 1)


def barrier() -> None:
    """Wait until every process has come here."""
    if active():
        torch.distributed.barrier()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``tensor`` over all processes, the same bits in each; the tensor itself is not changed."""
    if not active():
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total


def gather_objects(value: Any) -> list[Any]:
    """Return what every process passed, in the order of their numbers. Objects are pickled among ourselves."""
    if not active():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
