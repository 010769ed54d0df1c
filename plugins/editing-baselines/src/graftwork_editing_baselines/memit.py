"""MEMIT (Meng et al., ICLR 2023): many facts, spread over the MLPs of a band of layers.

    dW = R K^T (lam C + K K^T)^-1,  R = (Z - H) / (layers that are left)

with states recomputed after every write. After the authors' code (kmeng01/memit), rewritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from graftwork.console import Console
from graftwork.edit.draft import Draft
from graftwork.edit.edits import EditSet
from graftwork.edit.plugin import EditOptions, EditPlugin
from graftwork.edit.prefixes import generate_prefixes
from graftwork.edit.reading import keys, layer_point, states
from graftwork.edit.requests import Request
from graftwork.edit.sites import find_sites
from graftwork.edit.solve import RIDGE, solve_update
from graftwork.edit.statistics import Provider
from graftwork.edit.target import StateOptions, optimise_state
from pydantic import Field

from graftwork_editing_baselines.band import band


class MemitOptions(EditOptions):
    """Options of MEMIT."""

    layers: list[int] | None = Field(
        None, description="layers to write to; the band of the reference for GPT-J, 3 to 8 of 28, if not set"
    )
    lam: float = Field(
        15000.0, gt=0, description="weight of the second moments; a gain below 0.5 says too large"
    )
    ridge: float = Field(RIDGE, ge=0, description="share of the mean of lam C that is added to its diagonal")
    state: StateOptions = Field(default_factory=lambda: StateOptions.model_validate({}))


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


class MemitEditor:
    """MEMIT as an editor."""

    name = "memit"
    uses_statistics = True

    def __init__(self, options: MemitOptions) -> None:
        self.options = options

    def edit(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[Request],
        statistics: Provider,
        *,
        console: Console,
        seed: int,
    ) -> EditSet:
        options = self.options
        layers = band(model, options.layers, 3 / 28, 8 / 28, self.name)
        sites = find_sites(model, ["mlp"], layers)
        statistics.collect(sites)
        openings = generate_prefixes(
            model, tokenizer, options.state.prefixes, options.state.prefix_tokens, seed
        )
        wanted, steps = target_states(
            model, tokenizer, requests, layers[-1], options.state, openings, console
        )
        with Draft(model, sites, max_share=options.max_share) as draft:
            for number, site in enumerate(sites):
                missing = wanted - states(model, tokenizer, requests, layers[-1])
                residuals = missing / (len(sites) - number)
                (mine,) = keys(model, tokenizer, requests, [site], openings).values()
                factor = statistics.factor(site, options.lam, options.ridge)
                draft.write(site, solve_update(residuals.T, mine.T, factor))
            left = wanted - states(model, tokenizer, requests, layers[-1])
            report = {"layers": layers, "steps": steps, "left": left.norm(dim=1).tolist()}
            return draft.edit_set(self.name, self.name, requests, options.model_dump(), report)


class Memit(EditPlugin):
    """MEMIT as a plugin."""

    name = "memit"
    Options = MemitOptions

    @classmethod
    def editor(cls, options: MemitOptions) -> MemitEditor:
        return MemitEditor(options)
