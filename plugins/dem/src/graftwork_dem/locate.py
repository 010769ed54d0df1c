"""Scores of all places for every request, by any of the modes, decoupled from the literal instance by averaging."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graftwork.edit.errors import LocalizationError
from graftwork.edit.requests import Request
from graftwork.edit.sites import KINDS, Site

from graftwork_dem.attribution import attribute
from graftwork_dem.lines import Line, line
from graftwork_dem.options import LocateOptions
from graftwork_dem.passes import noise_scale
from graftwork_dem.recall import contributions
from graftwork_dem.select import Place, parse_place, select
from graftwork_dem.trace import SMALLEST, Traced, trace


@dataclass(frozen=True)
class Located:
    """Where one request's knowledge sits.

    Attributes:
        request: which.
        gains: layers x 2 (attn, mlp), what a place gives to the target's log-probability, mean over the request and its
            variants; what edits are placed by.
        scores: gains as shares of what the noise costs, mean over the lines that lose enough; zeros where none does;
            what maps are made of. For modes without noise the same as gains.
        own: the scores of the request's own line alone: before decoupling.
        skipped: why it has no scores, where it has none.
        clean, corrupted: J of the request's own line, where the mode measures them.
    """

    request: Request
    gains: torch.Tensor
    scores: torch.Tensor
    own: torch.Tensor
    skipped: str | None = None
    clean: float | None = None
    corrupted: float | None = None


def generator(seed: int, *words: str) -> torch.Generator:
    """Return a generator that depends on the seed and the words alone, not on the order of the calls."""
    digest = hashlib.sha256("\0".join([str(seed), *words]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def locate(
    model: Any,
    tokenizer: Any,
    request: Request,
    sites: Sequence[Site],
    options: LocateOptions,
    *,
    seed: int,
    std: float | None = None,
    gate: bool = False,
    least: float = SMALLEST,
) -> Located:
    """Return the scores of one request by attribution, tracing, recall, a list, or chance.

    Args:
        model, tokenizer: the model.
        request: one.
        sites: all of the model's.
        options: the mode and its numbers.
        seed: noise and chance depend on it and on the request's id, not on the order of the requests.
        std: see :func:`graftwork_dem.passes.noise_scale`; taken from the model where None.
        gate: spare the tracing of lines that will not count in ``scores``; ``gains`` are then of no use.
        least: log-probability that noise must cost for a line to count in ``scores``.

    Raises:
        LocalizationError: a listed site that the model does not have.
        RequestError: a text that leaves no tokens.
    """
    layers = 1 + max(site.layer for site in sites)
    empty = torch.zeros(layers, len(KINDS), dtype=torch.float64)
    if options.mode == "fixed":
        for layer, kind in map(parse_place, options.sites):
            if layer >= layers:
                raise LocalizationError(
                    f"site {kind}.{layer} is listed, and the model has layers 0 to {layers - 1}"
                )
            empty[layer, KINDS.index(kind)] = 1
        return Located(request, empty, empty, empty)
    if options.mode == "random":
        scores = torch.rand(
            layers, len(KINDS), dtype=torch.float64, generator=generator(seed, "random", request.id)
        )
        return Located(request, scores, scores, scores)
    subjects = [request.subject, *request.variants[: options.locate_variants]]
    lines = [line(tokenizer, request, subject) for subject in subjects]
    if options.mode == "recall":
        found = [contributions(model, one, sites)[0] for one in lines]
        mean = torch.stack(found).mean(0)
        return Located(request, mean, mean, found[0])
    std = (noise_scale(model) if std is None else std) * options.noise
    traced = [
        _traced(model, one, sites, options, std, gate, least, generator(seed, "noise", request.id, subject))
        for one, subject in zip(lines, subjects, strict=True)
    ]
    counted = [one.scores for one in traced if one.skipped is None]
    own = traced[0]
    return Located(
        request,
        torch.stack([one.gains for one in traced]).mean(0),
        torch.stack(counted).mean(0) if counted else empty,
        own.scores,
        None if counted else own.skipped,
        own.clean,
        own.corrupted,
    )


def _traced(
    model: Any,
    one: Line,
    sites: Sequence[Site],
    options: LocateOptions,
    std: float,
    gate: bool,
    least: float,
    noise: torch.Generator,
) -> Traced:
    if options.mode == "trace":
        return trace(
            model,
            one,
            sites,
            std=std,
            draws=options.draws,
            generator=noise,
            width=options.window,
            stride=options.stride,
            where=options.restore,
            gate=gate,
            least=least,
        )
    return attribute(model, one, sites, std=std, draws=options.draws, generator=noise, least=least)


def places(
    located: Sequence[Located], options: LocateOptions, donors: Sequence[Located] = ()
) -> list[dict[Place, float]]:
    """Return Omega and pi of every request.

    ``donors`` (mode other): whose gains each request takes instead of its own.

    Raises:
        LocalizationError: a request without a positive gain among the places that may be chosen.
    """
    gains = [_allowed(one.gains, options) for one in donors or located]
    if options.scope == "batch":
        gains = [torch.stack(gains).mean(0)] * len(gains)
    fixed = options.mode == "fixed"
    return [
        select(
            gain,
            n_sites=len(options.sites) if fixed else options.n_sites,
            min_attn=options.min_attn if "attn" in options.kinds and not fixed else 0,
            min_mlp=options.min_mlp if "mlp" in options.kinds and not fixed else 0,
            # What a user lists is taken as deep as it is.
            deepest=len(gain) - 1 if fixed else options.l_max,
            weights="uniform" if options.mode in ("fixed", "random") else options.weights,
            where=f"request '{one.request.id}'",
        )
        for one, gain in zip(located, gains, strict=True)
    ]


def _allowed(scores: torch.Tensor, options: LocateOptions) -> torch.Tensor:
    """Return the scores with kinds and shallow layers that may not be chosen at zero."""
    if options.mode == "fixed":
        return scores
    keep = torch.tensor([float(kind in options.kinds) for kind in KINDS], dtype=scores.dtype)
    found = scores * keep
    found[: options.l_min] = 0
    return found
