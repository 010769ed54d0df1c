"""A linear that is to be compressed: its weight, and what the calibration text says of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from graftwork.transform.block import Block

from graftwork_dam.factor import root


@dataclass(frozen=True)
class Layer:
    """A linear of a decoder layer.

    Attributes:
        name: within the decoder layer.
        weight: m x n, float32 or wider.
        moments: n x n, ``sum x x^T`` over all calibration tokens, float64.
        tokens: how many these are.
        sample: t x n, inputs of some of them, evenly spread, in the dtype of ``weight``.
    """

    name: str
    weight: torch.Tensor
    moments: torch.Tensor
    tokens: int
    sample: torch.Tensor

    def rows(self, of_tokens: bool) -> torch.Tensor:
        """Return the inputs (rows x n) on which losses are taken.

        Where nothing is rounded that depends on the token (not ``of_tokens``), a root of the moments, ``R R^T``, gives
        the same loss as all tokens together, ``||R^T E^T|| = ||X E^T||``; it is taken if it has fewer rows than the
        sample.
        """
        if of_tokens or self.weight.shape[1] > len(self.sample):
            return self.sample
        return root(self.moments, name=self.name).T.to(self.weight)


def measure(block: Block, modules: Mapping[str, Any], tokens: int) -> dict[str, Layer]:
    """Return the linears ``modules`` of a decoder layer with their statistics; at most ``tokens`` in a sample."""
    names = list(modules)
    moments = block.second_moments(names)
    samples = sample_inputs(block, names, tokens)
    found = {}
    for name, module in modules.items():
        weight = module.weight.detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        found[name] = Layer(name, weight, moments[name], block.tokens, samples[name].to(weight))
    return found


def sample_inputs(block: Block, names: list[str], tokens: int) -> dict[str, torch.Tensor]:
    """Return the inputs of linears (t x n each) at ``tokens`` tokens, evenly spread over the calibration text.

    Linears that read the same tensor share one.
    """
    total = block.tokens
    count = min(tokens, total)
    wanted = torch.arange(count) * total // count
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    begin = 0
    for seen in block.inputs(names):
        taken: dict[int, torch.Tensor] = {}
        size = 0
        for name, x in seen.items():
            size = len(x)
            here = wanted[(wanted >= begin) & (wanted < begin + size)] - begin
            if id(x) not in taken:
                taken[id(x)] = x[here.to(x.device)].clone()
            parts[name].append(taken[id(x)])
        begin += size
    joined: dict[tuple[int, ...], torch.Tensor] = {}
    found = {}
    for name, rows in parts.items():
        key = tuple(map(id, rows))
        if key not in joined:
            joined[key] = torch.cat(rows)
        found[name] = joined[key]
    return found
