"""KLFT A: causal tracing. What does a clean site output give back to a run whose event is noise?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from graftwork.edit.sites import KINDS, Site

from graftwork_dem.lines import Line
from graftwork_dem.passes import corrupted, embeddings, record, rerun, restore

HIGHEST = 1.5
"""A score is cut here: a site can give back more than was lost."""
SMALLEST = 0.05
"""An event whose noise costs less log-probability than this says nothing about places."""
Where = Literal["last", "event"]


@dataclass(frozen=True)
class Traced:
    """What was found for one line.

    Attributes:
        scores: layers x 2 (attn, mlp), the share of the lost log-probability that a site gives back, 0 to 1.5; zero
            where the line is skipped.
        gains: the same unnormalised and uncut, J_restored - J_corrupted.
        clean, corrupted: J of both runs.
        skipped: why the line says nothing, where it does not.
    """

    scores: torch.Tensor
    gains: torch.Tensor
    clean: float
    corrupted: float
    skipped: str | None = None


def too_little(lost: float, least: float) -> str | None:
    """Return why a line that loses so much log-probability by noise is skipped, where it is."""
    if lost >= least and lost > torch.finfo(torch.float32).eps:
        return None
    return f"noise on its event costs {lost:.3g} of log-probability, less than {least:g}"


def windows(layers: int, width: int, stride: int) -> list[tuple[int, range, range]]:
    """Return for every window its centre, the layers that are restored, and those whose score it is.

    Centres are ``stride`` apart; with a stride of 1 every layer has a window of its own. A layer takes the score of
    the nearest centre.
    """
    first = min((stride - 1) // 2, layers - 1)
    centres = list(range(first, layers, stride))
    found = []
    for number, centre in enumerate(centres):
        low = centre - (width - 1) // 2
        own = range(
            0 if not number else (centres[number - 1] + centre) // 2 + 1,
            layers if number + 1 == len(centres) else (centre + centres[number + 1]) // 2 + 1,
        )
        found.append((centre, range(max(0, low), min(layers, low + width)), own))
    return found


def trace(
    model: Any,
    line: Line,
    sites: Sequence[Site],
    *,
    std: float,
    draws: int,
    generator: torch.Generator,
    width: int = 1,
    stride: int = 1,
    where: Where = "last",
    gate: bool = True,
    least: float = SMALLEST,
) -> Traced:
    """Trace one line: 2 L / stride passes of ``draws`` rows, each from its window's first layer on.

    ``std`` is that of the noise itself. A line that loses less than ``least`` by it, or nothing, is skipped: its
    scores are zero, and with ``gate`` it is not traced at all. Noise of 0 takes nothing away: J is the same.
    """
    at = {(site.layer, site.kind): site for site in sites}
    layers = 1 + max(site.layer for site in sites)
    gains = torch.zeros(layers, len(KINDS), dtype=torch.float64)
    with torch.no_grad():
        clean = record(model, line, embeddings(model, line), sites)
        dirty = record(model, line, corrupted(model, line, std=std, draws=draws, generator=generator), sites)
        before, after = float(clean.j.mean()), float(dirty.j.double().mean())
        if std == 0:
            after = before
        skipped = too_little(before - after, least)
        if skipped and (gate or std == 0):
            return Traced(torch.zeros_like(gains), gains, before, after, skipped)
        positions = line.last if where == "last" else line.event
        for _, restored, own in windows(layers, width, stride):
            for place, kind in enumerate(KINDS):
                changes = {
                    at[layer, kind]: restore(clean.outputs[at[layer, kind]], positions)
                    for layer in restored
                    if (layer, kind) in at
                }
                j = rerun(model, line, dirty, restored.start, changes)
                gains[own.start : own.stop, place] = float(j.double().mean()) - after
    scores = torch.zeros_like(gains) if skipped else (gains / (before - after)).clamp(0, HIGHEST)
    return Traced(scores, gains, before, after, skipped)
