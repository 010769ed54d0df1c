"""The processes of one run: who is who, waiting for each other, and sums over all of them.

Every function also works in a single process, where torch.distributed is not initialised.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

Join = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def active() -> bool:
    """Return whether several processes were started and have met."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def started() -> tuple[int, int]:
    """Return this process's number and how many the launcher has started, also before they have met."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def meet() -> None:
    """Meet the processes that the launcher (torchrun) has started; one that was started alone is a group of one.

    Tensors on the CPU and on accelerators can be exchanged afterwards. Each process gets the accelerator with its
    number on this machine.
    """
    if active():
        return
    device = torch.accelerator.current_accelerator()
    backend = "gloo"
    if device is not None:
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        backend = f"cpu:gloo,{device.type}:{torch.distributed.get_default_backend_for_device(device)}"
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group(backend)
    else:
        torch.distributed.init_process_group(backend, init_method="tcp://localhost:0", rank=0, world_size=1)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Have met the others meanwhile; a process that was started alone is by itself again afterwards."""
    alone = not active() and "WORLD_SIZE" not in os.environ
    meet()
    try:
        yield
    finally:
        if alone:
            torch.distributed.destroy_process_group()


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


def mean_over_ranks(total: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """Return this process's part of a mean over the rows of all processes: its sum times processes / all rows.

    For losses that are means over tokens: data-parallel training takes the mean over processes, and a mean of means
    gives a token more weight where a process has fewer of them. ``total`` is the sum over the own rows, with its
    gradient, ``count`` how many these are. 0 where no process has any.
    """
    if not active():
        return total / max(int(count), 1)
    rows = sum_over_ranks(torch.as_tensor(count, device=total.device, dtype=torch.long))
    return total * (torch.distributed.get_world_size() / max(int(rows), 1))


def gather_objects(value: Any) -> list[Any]:
    """Return what every process passed, in the order of their numbers. Objects are pickled among ourselves."""
    if not active():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def over_ranks(tensor: torch.Tensor, join: Join) -> torch.Tensor:
    """Return sum, maximum or minimum over all processes (``torch.add``, ``maximum``, ``minimum``), as above."""
    if not active():
        return tensor
    operations = torch.distributed.ReduceOp
    known = {torch.add: operations.SUM, torch.maximum: operations.MAX, torch.minimum: operations.MIN}
    joined = tensor.clone()
    torch.distributed.all_reduce(joined, known[join])
    return joined


def from_rank(tensor: torch.Tensor | None, owner: int) -> torch.Tensor:
    """Return in every process the tensor (on the CPU) that the process ``owner`` passed; the others pass None."""
    if not active():
        assert tensor is not None
        return tensor
    described = [None if tensor is None else (tensor.shape, tensor.dtype)]
    torch.distributed.broadcast_object_list(described, owner)
    if tensor is None:
        assert described[0] is not None
        shape, dtype = described[0]
        tensor = torch.empty(shape, dtype=dtype)
    # As bytes, because not every back end knows every dtype.
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    torch.distributed.broadcast(raw, owner)
    return raw.view(tensor.dtype).reshape(tensor.shape)


def from_main(value: Any) -> Any:
    """Return in every process what the main process passed."""
    if not active():
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, 0)
    return values[0]
