"""What is used up and what is left: neurons, and directions of the inputs. Section 6.

Neurons are plentiful; the input directions are shared by all neurons of a layer and run out first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from graftwork import AreaChart

from graftwork_parsp.neurons import Mlp
from graftwork_parsp.past import Past
from graftwork_parsp.regions import Region


@dataclass(frozen=True)
class Capacity:
    """State of one layer after a task: shares of its neurons and of its input directions.

    ``used``: in some core so far; ``overlap``: of this task's core in an earlier one; ``directions``: k/d;
    ``entropy``: mean H of the core; ``generalist``: share of the core.
    """

    layer: str
    used: float
    overlap: float
    directions: float
    entropy: float
    generalist: float

    @property
    def free(self) -> float:
        return 1 - self.directions


def capacities(mlps: Sequence[Mlp], past: Past, regions: dict[str, Region]) -> list[Capacity]:
    """Return the state of every layer after the task that ``past`` has just recorded with ``regions``."""
    earlier = {mlp.name: torch.zeros(mlp.neurons, dtype=torch.bool) for mlp in mlps}
    for cores in past.cores[:-1]:
        for key, core in cores.items():
            earlier[key][core.long()] = True
    result = []
    for mlp, used in ((mlp, past.used(mlps)[mlp.name]) for mlp in mlps):
        region = regions[mlp.name]
        count = max(len(region.core), 1)
        result.append(
            Capacity(
                layer=mlp.name,
                used=used.double().mean().item(),
                overlap=earlier[mlp.name][region.core].sum().item() / count,
                directions=past.taken[-1].get(mlp.name, 0) / mlp.inputs,
                entropy=region.entropy[region.core].sum().item() / count,
                generalist=region.generalist.sum().item() / count,
            )
        )
    return result


def charts(mlps: Sequence[Mlp], past: Past) -> list[AreaChart]:
    """Return what each task took of every layer: neurons, and (where there is a null space) input directions."""
    layers = [mlp.name for mlp in mlps]
    neurons: dict[str, list[float]] = {}
    seen = {mlp.name: torch.zeros(mlp.neurons, dtype=torch.bool) for mlp in mlps}
    for name, cores in zip(past.names, past.cores, strict=True):
        if cores:
            neurons[name] = []
            for mlp in mlps:
                core = cores[mlp.name].long()
                neurons[name].append((~seen[mlp.name][core]).sum().item() / mlp.neurons)
                seen[mlp.name][core] = True
    found = [
        AreaChart(
            "neurons",
            "Share of each layer's neurons that a task's core has and no earlier core had.",
            layers,
            neurons,
        )
    ]
    if any(past.taken):
        directions: dict[str, list[float]] = {}
        highest = dict.fromkeys(layers, 0)
        for name, taken in zip(past.names, past.taken, strict=True):
            directions[name] = []
            for mlp in mlps:
                more = max(taken.get(mlp.name, 0) - highest[mlp.name], 0)
                directions[name].append(more / mlp.inputs)
                highest[mlp.name] += more
        found.append(
            AreaChart(
                "input directions",
                "Share of each layer's input directions that a task adds to what later tasks must leave alone; where "
                "their number falls, which the common threshold allows, the highest so far is shown.",
                layers,
                directions,
            )
        )
    return found
