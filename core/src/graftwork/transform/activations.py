"""Texts on their way through the model, one layer at a time: hidden states in memory or on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from graftwork.distributed import Join, from_rank, over_ranks, rank_and_world
from graftwork.files import not_written
from graftwork.transform.structure import enter

Layer = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]


class Hidden:
    """The hidden states of all batches before one layer, in memory, in a folder, or in both."""

    def __init__(self, folder: Path | None, in_memory: bool) -> None:
        self.folder, self.in_memory = folder, in_memory
        self._batches: dict[int, torch.Tensor] = {}

    def put(self, number: int, hidden: torch.Tensor) -> None:
        """Keep the hidden states of a batch."""
        hidden = hidden.detach().to("cpu")
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                save_file({"hidden": hidden.contiguous()}, self._path(number))
            except (SafetensorError, OSError) as error:
                raise not_written(self.folder, error) from error
        if self.in_memory:
            self._batches[number] = hidden

    def get(self, number: int) -> torch.Tensor:
        """Return the hidden states of a batch."""
        if number not in self._batches:
            hidden = load_file(self._path(number))["hidden"]
            if not self.in_memory:
                return hidden
            self._batches[number] = hidden
        return self._batches[number]

    def forget(self, number: int) -> None:
        """Free the memory of a batch; a file stays."""
        self._batches.pop(number, None)

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:05d}.safetensors"


class Stream:
    """Windows of tokens that go through the model layer by layer, their batches dealt out to the processes in turn.

    Args:
        name: of its folder.
        windows: token ids (windows x window).
        batch_size: windows that go through together.
        folder: where the hidden states before each layer are kept, so that a run can go on; None keeps nothing.
        in_memory: whether they are kept in memory, too.
        device: where layers run.

    Attributes:
        ids: token ids of all batches.
        own: the numbers of the batches that this process has.
        tokens: in all windows of all processes.
    """

    def __init__(
        self,
        name: str,
        windows: torch.Tensor,
        batch_size: int,
        *,
        folder: Path | None = None,
        in_memory: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.name = name
        self.device = device or torch.device("cpu")
        rank, self._world = rank_and_world()
        # So that every process gets a batch where there are windows enough.
        self.ids = list(windows.split(max(1, min(batch_size, len(windows) // self._world))))
        self.own = range(rank, len(self.ids), self._world)
        self.tokens = windows.numel()
        self.layer = 0
        self._in_memory = in_memory or folder is None
        self._folder = folder / name if folder is not None else None
        self._calls: dict[int, list[dict[str, Any]]] = {}
        self.now = self._at(0)
        self.following: Hidden | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def start(self, model: Any, layer: int = 0) -> None:
        """Embed the windows, or go on before ``layer`` with what was kept there."""
        self.layer = layer
        self.now = self._at(layer)
        for number, ids in enumerate(self.ids):
            wanted = not layer and number in self.own
            if not wanted and len(ids) in self._calls:
                continue
            hidden, calls = enter(model, ids.to(self.device))
            self._calls.setdefault(len(ids), calls)
            if wanted:
                self.now.put(number, hidden)

    def get(self, number: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the hidden states of an own batch before the current layer, and what the layer is called with."""
        return self.now.get(number).to(self.device), self.arguments(number)

    def share(self) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """Yield this process's batches as :meth:`get` returns them."""
        for number in self.own:
            yield self.get(number)

    def every(self) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """Yield all batches in order, those of other processes too; all processes must do so in step."""
        for number in range(len(self)):
            yield self.anywhere(self.now, number), self.arguments(number)

    def anywhere(self, hidden: Hidden, number: int) -> torch.Tensor:
        """Return a batch of ``hidden`` (``now`` or ``following``) in all processes, whichever has it."""
        mine = hidden.get(number) if number in self.own else None
        return from_rank(mine, number % self._world).to(self.device)

    def arguments(self, number: int) -> dict[str, Any]:
        """Return the other arguments of the current layer's forward."""
        return self._calls[len(self.ids[number])][self.layer]

    def compute(
        self,
        layer: Layer,
        *,
        keep: bool = False,
        limit: int | None = None,
        progress: Callable[[], Any] | None = None,
    ) -> None:
        """Make ``following``, the hidden states after ``layer`` of the first ``limit`` batches (all where None).

        Those before it are freed unless ``keep``.
        """
        self.following = self._at(self.layer + 1)
        with torch.no_grad():
            for number in self.own:
                if limit is not None and number >= limit:
                    break
                hidden, kwargs = self.get(number)
                self.following.put(number, layer(hidden, kwargs))
                if not keep:
                    self.now.forget(number)
                if progress:
                    progress()

    def step(self) -> None:
        """Go on to the next layer."""
        assert self.following is not None
        self.now, self.following = self.following, None
        self.layer += 1

    def clean(self) -> None:
        """Remove the files of the layers before the current one; other processes may be writing the next."""
        if self._folder is not None and self._folder.is_dir():
            for folder in self._folder.iterdir():
                if int(folder.name) < self.layer:
                    shutil.rmtree(folder)

    def reduced(self, value: torch.Tensor, join: Join) -> torch.Tensor:
        """Return a statistic over the windows of all processes, from those over each one's share."""
        return over_ranks(value, join)

    def _at(self, layer: int) -> Hidden:
        folder = self._folder / f"{layer:05d}" if self._folder is not None else None
        return Hidden(folder, self._in_memory)
