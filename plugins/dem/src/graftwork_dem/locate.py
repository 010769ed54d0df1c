"""Scores of all places for every request, by any of the modes, decoupled from the literal instance by averaging."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
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
from graftwork_dem.trace import Traced, trace

Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Located:
    """Where one request's knowledge sits.

    Attributes:
        request: which.
        scores: layers x 2 (attn, mlp), the mean over the lines that count; zeros where none does.
        own: those of the request's own line alone: before decoupling.
        skipped: why it has no scores, where it has none.
        clean, corrupted: J of the request's own line, where the mode measures them.
    """

    request: Request
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
) -> Located:
    """Return the scores of one request by attribution, tracing, recall, a list, or chance.

    ``std``: see :func:`graftwork_dem.passes.noise_scale`; taken from the model where None.

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
        return Located(request, empty, empty)
    if options.mode == "random":
        scores = torch.rand(
            layers, len(KINDS), dtype=torch.float64, generator=generator(seed, "random", request.id)
        )
        return Located(request, scores, scores)
    subjects = [request.subject, *request.variants[: options.locate_variants]]
    lines = [line(tokenizer, request, subject) for subject in subjects]
    if options.mode == "recall":
        found = [contributions(model, one, sites)[0] for one in lines]
        return Located(request, torch.stack(found).mean(0), found[0])
    std = (noise_scale(model) if std is None else std) * options.noise
    traced = [
        _traced(model, one, sites, options, std, generator(seed, "noise", request.id, subject))
        for one, subject in zip(lines, subjects, strict=True)
    ]
    counted = [one.scores for one in traced if one.skipped is None]
    own = traced[0]
    return Located(
        request,
        torch.stack(counted).mean(0) if counted else empty,
        own.scores,
        None if counted else own.skipped,
        own.clean,
        own.corrupted,
    )


def _traced(
    model: Any, one: Line, sites: Sequence[Site], options: LocateOptions, std: float, noise: torch.Generator
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
        )
    return attribute(model, one, sites, std=std, draws=options.draws, generator=noise)


def places(
    located: Sequence[Located], options: LocateOptions, donors: Sequence[Located] = ()
) -> list[dict[Place, float]]:
    """Return Omega and pi of every request.

    ``donors`` (mode other): whose scores each request takes instead of its own.

    Raises:
        LocalizationError: a request without scores, or without a positive one.
    """
    given = list(donors or located)
    for one in given:
        if one.skipped is not None and options.scope == "edit":
            raise LocalizationError(
                f"request '{one.request.id}' cannot be located: {one.skipped}; take scope: batch, another mode, or "
                f"leave it out"
            )
    scores = [_allowed(one.scores, options) for one in given]
    if options.scope == "batch":
        counted = [score for score, one in zip(scores, given, strict=True) if one.skipped is None]
        if not counted:
            raise LocalizationError(
                f"no request of the batch can be located; the first: {given[0].skipped}"
            )
        scores = [torch.stack(counted).mean(0)] * len(given)
    fixed = options.mode == "fixed"
    return [
        select(
            score,
            n_sites=len(options.sites) if fixed else options.n_sites,
            min_attn=options.min_attn if "attn" in options.kinds and not fixed else 0,
            min_mlp=options.min_mlp if "mlp" in options.kinds and not fixed else 0,
            # What a user lists is taken as deep as it is.
            deepest=len(score) - 1 if fixed else options.l_max,
            weights="uniform" if options.mode in ("fixed", "random") else options.weights,
            where=f"request '{one.request.id}'",
        )
        for one, score in zip(located, scores, strict=True)
    ]


def _allowed(scores: torch.Tensor, options: LocateOptions) -> torch.Tensor:
    """Return the scores with kinds that may not be chosen at zero."""
    keep = torch.tensor([float(kind in options.kinds) for kind in KINDS], dtype=scores.dtype)
    return scores * keep
