"""KLFT B, recall: which site outputs push the target's tokens where they are predicted. The formula is ours.

    c(l, m) = mean over target tokens t of  < g * o_lm(pos_t) / s(pos_t) , U[y_t] >

with the final norm's gain g, and its scale s (root mean square, or standard deviation of what is centred) frozen at the
clean run's. The final norm is then linear, so the contributions of all sites and of the embedding add up to the logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from graftwork.edit.sites import KINDS, Site
from graftwork.transform.structure import find_norm
from torch import nn

from graftwork_dem.lines import Line
from graftwork_dem.passes import embeddings, record


def frozen_norm(norm: nn.Module, state: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return what ``value`` adds to ``norm(state)`` with the scale that ``norm`` has at ``state`` (both n x h).

    The gain is read off: an RMS norm gives it for a vector of ones, whatever it adds to its weight.
    """
    if isinstance(norm, nn.LayerNorm):
        gain = torch.ones_like(state[0]) if norm.weight is None else norm.weight.detach()
        base = norm(state) - (0 if norm.bias is None else norm.bias.detach())
        state = state - state.mean(-1, keepdim=True)
        value = value - value.mean(-1, keepdim=True)
    else:
        gain, base = norm(torch.ones_like(state[:1]))[0], norm(state)
    straight = gain * state
    scale = (base * straight).sum(-1, keepdim=True) / straight.square().sum(-1, keepdim=True)
    return scale * gain * value


def contributions(model: Any, line: Line, sites: Sequence[Site]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return c (layers x 2), and that of the rest of the residual stream, such as embeddings; float64."""
    layers = 1 + max(site.layer for site in sites)
    found = torch.zeros(layers, len(KINDS), dtype=torch.float64)
    norm = model.get_submodule(find_norm(model))
    with torch.no_grad():
        clean = record(model, line, embeddings(model, line), sites)
        state = clean.inputs[-1][0, line.predicts]
        rows = model.get_output_embeddings().weight.detach()[line.targets.to(state.device)]

        def logit(value: torch.Tensor) -> float:
            return float((frozen_norm(norm, state, value).double() * rows.double()).sum(-1).mean())

        rest = state
        for site in sites:
            value = clean.outputs[site][0, line.predicts]
            found[site.layer, KINDS.index(site.kind)] = logit(value)
            rest = rest - value
        return found, torch.tensor(logit(rest), dtype=torch.float64)
