"""Attribution: tracing to first order, by one gradient instead of a pass per place. The formula is ours.

a(l, m) = mean over draws of  sum over event tokens t of  < dJ / do_lm(t) |corrupted , o_clean(t) - o_corrupted(t) >
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from graftwork.edit.sites import KINDS, Site

from graftwork_dem.lines import Line
from graftwork_dem.passes import corrupted, embeddings, record
from graftwork_dem.trace import SMALLEST, Traced, Where, too_little


def attribute(
    model: Any,
    line: Line,
    sites: Sequence[Site],
    *,
    std: float,
    draws: int,
    generator: torch.Generator,
    where: Where = "event",
    least: float = SMALLEST,
) -> Traced:
    """Return first-order gains (layers x 2) of restoring each site: two forward passes and one backward pass.

    ``scores`` are the gains over what the noise costs, with their sign. Parameters get no gradient, whether they ask
    for it or not.
    """
    layers = 1 + max(site.layer for site in sites)
    gains = torch.zeros(layers, len(KINDS), dtype=torch.float64)
    with torch.no_grad():
        clean = record(model, line, embeddings(model, line), sites)
    with torch.enable_grad():
        noisy = corrupted(model, line, std=std, draws=draws, generator=generator).requires_grad_(True)
        dirty = record(model, line, noisy, sites)
        outputs = [dirty.outputs[site] for site in sites]
        # Rows do not know of each other, so the gradient of the sum is each row's own.
        gradients = torch.autograd.grad(dirty.j.sum(), outputs, allow_unused=True)
    positions = line.last if where == "last" else line.event
    for site, output, gradient in zip(sites, outputs, gradients, strict=True):
        if gradient is None:  # the last layer's event tokens reach no prediction
            continue
        moved = clean.outputs[site][:, positions].double() - output.detach()[:, positions].double()
        products = (gradient[:, positions].double() * moved).sum((-1, -2))
        gains[site.layer, KINDS.index(site.kind)] = float(products.mean())
    before, after = float(clean.j.mean()), float(dirty.j.detach().double().mean())
    if std == 0:
        after = before
    lost = before - after
    skipped = too_little(lost, least)
    scores = torch.zeros_like(gains) if skipped else gains / lost
    return Traced(scores, gains, before, after, skipped)
