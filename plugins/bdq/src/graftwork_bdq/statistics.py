"""What the places of a layer get as inputs: channel by channel, the energy and the largest size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from graftwork import UserError
from graftwork.transform.block import Block
from graftwork.transform.structure import Place
from torch import nn

from graftwork_bdq.layer import Statistics
from graftwork_bdq.options import BdqOptions


class Gatherer:
    """Sums over batches; ``skip_first`` leaves the first token of every window out. Sums are in float64."""

    def __init__(self, skip_first: bool = False) -> None:
        self.skip_first = skip_first
        self._found: dict[str, Statistics] = {}

    def add(self, place: str, x: torch.Tensor, where: str = "") -> None:
        """Take in the input ``x`` (windows x tokens x d) of ``place``.

        Raises:
            UserError: it holds NaN or infinity; the sentence names ``where``.
        """
        tokens = (x[:, 1:] if self.skip_first else x).detach().flatten(0, -2)
        energy = tokens.double().square().sum(0)
        if not bool(torch.isfinite(energy).all()):
            raise UserError(
                f"the input of '{where or place}' is no number (NaN or infinity) for some calibration token; look at "
                f"the weights before it, or use float32"
            )
        largest = tokens.abs().amax(0).double() if len(tokens) else torch.zeros_like(energy)
        before = self._found.get(place)
        if before is not None:
            energy = before.energy + energy
            largest = torch.maximum(before.largest, largest)
        self._found[place] = Statistics(energy, largest)

    def result(self) -> Mapping[str, Statistics]:
        return self._found

    @contextlib.contextmanager
    def watching(self, layer: nn.Module, found: Sequence[Place], name: str) -> Iterator[None]:
        """Take in what the places of ``layer`` (called ``name``) read in forward passes meanwhile."""
        with contextlib.ExitStack() as stack:
            for place in found:
                linear = place.linears[0]

                def see(
                    module: Any, args: tuple[Any, ...], place: str = place.name, linear: str = linear
                ) -> None:
                    self.add(place, args[0], f"{name}.{linear}")

                stack.callback(layer.get_submodule(linear).register_forward_pre_hook(see).remove)
            yield


def of_block(block: Block, options: BdqOptions) -> Mapping[str, Statistics]:
    """Return the statistics that the scales of a block start from; none where they start at one.

    Raises:
        UserError: an input that is no number.
    """
    if options.start == "identity":
        return {}
    found = block.places()
    if options.exclude_first_token:
        gatherer = Gatherer(skip_first=True)
        with gatherer.watching(block.module, found, block.name), torch.no_grad():
            for hidden, kwargs in block.batches(share=True):
                block.run(hidden, kwargs)
        return {
            place: Statistics(block.reduced(one.energy, torch.add), block.reduced(one.largest, torch.maximum))
            for place, one in gatherer.result().items()
        }
    names = {place.name: place.linears[0] for place in found}
    if options.start == "energy":
        energy = block.energy(list(names.values()))
        return {place: Statistics(energy=energy[linear]) for place, linear in names.items()}
    high, low = block.maxima(list(names.values())), block.minima(list(names.values()))
    return {
        place: Statistics(largest=torch.maximum(high[linear], -low[linear]))
        for place, linear in names.items()
    }
