"""What MEMIT and AlphaEdit share: target states behind a band of layers, and residuals spread over its MLPs.

    R = (Z - H) / (layers that are left)

with states H recomputed after every write; the methods differ in the update that is solved for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from graftwork.console import Console
from graftwork.edit.draft import Draft
from graftwork.edit.edits import EditSet
from graftwork.edit.plugin import EditOptions
from graftwork.edit.prefixes import generate_prefixes
from graftwork.edit.reading import keys, layer_point, states
from graftwork.edit.requests import Request
from graftwork.edit.sites import Site, find_sites
from graftwork.edit.solve import Update
from graftwork.edit.statistics import Provider
from graftwork.edit.target import StateOptions, optimise_state
from pydantic import Field

from graftwork_editing_baselines.band import band

# From a site, residuals (h x n) and keys (d x n), all float64.
Solve = Callable[[Site, torch.Tensor, torch.Tensor], Update]


class SpreadOptions(EditOptions):
    """Options of both."""

    layers: list[int] | None = Field(
        None, description="layers to write to; the band of MEMIT for GPT-J, 3 to 8 of 28, if not set"
    )
    state: StateOptions = Field(default_factory=lambda: StateOptions.model_validate({}))


def spread_edit(
    name: str,
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    statistics: Provider,
    options: SpreadOptions,
    solve: Solve,
    *,
    console: Console,
    seed: int,
    told: Mapping[str, Any] | None = None,
) -> EditSet:
    """Return the edits of all requests in one batch, written site by site in the order of depth.

    ``solve`` is asked once per site, with the weights of the sites before it written; ``told`` goes into the report,
    as it is after the last.
    """
    layers = band(model, options.layers, 3 / 28, 8 / 28, name)
    sites = find_sites(model, ["mlp"], layers)
    statistics.collect(sites)
    openings = generate_prefixes(model, tokenizer, options.state.prefixes, options.state.prefix_tokens, seed)
    wanted, steps = target_states(model, tokenizer, requests, layers[-1], options.state, openings, console)

    def missing() -> torch.Tensor:
        return wanted - states(model, tokenizer, requests, layers[-1])

    with Draft(model, sites, max_share=options.max_share) as draft:
        for number, site in enumerate(sites):
            residuals = missing() / (len(sites) - number)
            (mine,) = keys(model, tokenizer, requests, [site], openings).values()
            draft.write(site, solve(site, residuals.T, mine.T))
        left = missing().norm(dim=1).tolist()
        report = {"layers": layers, "steps": steps, "left": left, **(told or {})}
        return draft.edit_set(name, name, requests, options.model_dump(), report)


def target_states(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    layer: int,
    options: StateOptions,
    prefixes: Sequence[str],
    console: Console,
) -> tuple[torch.Tensor, list[int]]:
    """Return the wanted residual stream behind ``layer`` (n x h, float64), and how many steps each took.

    It is the stream as :func:`graftwork.edit.reading.states` reads it plus what was found, so that nothing found means
    nothing to write.
    """
    point = layer_point(model, layer)
    found, steps = [], []
    with console.bar(len(requests), "target states", "request") as bar:
        for request in requests:
            state = optimise_state(model, tokenizer, request, point, options, prefixes)
            (value,) = state.delta.values()
            found.append(value.double())
            steps.append(len(state.losses))
            bar.update(1)
    return states(model, tokenizer, requests, layer) + torch.stack(found), steps
