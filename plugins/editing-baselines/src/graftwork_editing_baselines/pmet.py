"""PMET (Li et al., AAAI 2024): states of attention and MLP found together, the MLP's alone is written.

Target vectors are those of the modules' outputs at the last layer of the band; the share of the residual is
1 / sqrt(layers that are left), and by default the weights of the MLPs alone are written. After the authors' code
(xpq-tech/PMET), rewritten, with a solve in place of the inverse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from graftwork.console import Console
from graftwork.edit.draft import Draft
from graftwork.edit.edits import EditSet
from graftwork.edit.encoding import rows_of
from graftwork.edit.plugin import EditOptions, EditPlugin
from graftwork.edit.prefixes import generate_prefixes
from graftwork.edit.reading import keys, read
from graftwork.edit.requests import Request
from graftwork.edit.sites import Kind, Site, find_sites
from graftwork.edit.solve import RIDGE, solve_update
from graftwork.edit.statistics import Provider
from graftwork.edit.target import StateOptions, optimise_state
from pydantic import Field

from graftwork_editing_baselines.band import band


class PmetState(StateOptions):
    """How the states are found; the defaults of PMET for GPT-J."""

    steps: int = Field(30, ge=1, description="forward passes at most; one fewer steps of Adam")
    lr: float = Field(0.2, gt=0, description="of Adam")
    kl: float = Field(1.0, ge=0, description="weight of the divergence on '{subject} is a'")
    known: float = Field(
        0.1,
        gt=0,
        le=1,
        description="factor on the likelihood while the target is the likeliest already and KL > 0.01",
    )


class PmetOptions(EditOptions):
    """Options of PMET."""

    layers: list[int] | None = Field(
        None, description="layers to write to; the band of the reference for GPT-J, 3 to 8 of 28, if not set"
    )
    write: Literal["mlp", "both"] = Field(
        "mlp", description="weights that are written: those of MLPs, or both kinds"
    )
    lam: float = Field(6000.0, gt=0, description="weight of the second moments")
    ridge: float = Field(RIDGE, ge=0, description="share of the mean of lam C that is added to its diagonal")
    state: PmetState = Field(default_factory=lambda: PmetState.model_validate({}))


class PmetEditor:
    """PMET as an editor."""

    name = "pmet"
    uses_statistics = True

    def __init__(self, options: PmetOptions) -> None:
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
        kinds: list[Kind] = ["mlp"] if options.write == "mlp" else ["attn", "mlp"]
        sites = find_sites(model, kinds, layers)
        statistics.collect(sites)
        last = {site.kind: site for site in find_sites(model, layers=[layers[-1]])}
        openings = generate_prefixes(
            model, tokenizer, options.state.prefixes, options.state.prefix_tokens, seed
        )
        wanted: dict[str, list[torch.Tensor]] = {kind: [] for kind in last}
        steps = []
        points = {site.name: site.module for site in last.values()}
        with console.bar(len(requests), "target states", "request") as bar:
            for request in requests:
                state = optimise_state(model, tokenizer, request, points, options.state, openings)
                for kind, site in last.items():
                    wanted[kind].append(state.delta[site.name].double())
                steps.append(len(state.losses))
                bar.update(1)
        goal = {
            kind: torch.stack(values) + outputs(model, tokenizer, requests, last[kind])
            for kind, values in wanted.items()
        }
        with Draft(model, sites, max_share=options.max_share) as draft:
            for site in sites:
                end = last[site.kind]
                residuals = goal[site.kind] - outputs(model, tokenizer, requests, end)
                # At the last layer all that is left is written; before it more than an equal share.
                residuals /= math.sqrt(len(layers) - layers.index(site.layer))
                (mine,) = keys(model, tokenizer, requests, [site], openings).values()
                factor = statistics.factor(site, options.lam, options.ridge)
                draft.write(site, solve_update(residuals.T, mine.T, factor))
            report = {"layers": layers, "steps": steps}
            return draft.edit_set(self.name, self.name, requests, options.model_dump(), report)


def outputs(model: Any, tokenizer: Any, requests: Sequence[Request], site: Site) -> torch.Tensor:
    """Return what a site gives at the last subject token of the bare prompts (n x h, float64)."""
    rows = [rows_of(tokenizer, request, target=False)[0] for request in requests]
    return read(model, tokenizer, rows, outputs={site.name: site.module})[site.name].double()


class Pmet(EditPlugin):
    """PMET as a plugin."""

    name = "pmet"
    Options = PmetOptions

    @classmethod
    def editor(cls, options: PmetOptions) -> PmetEditor:
        return PmetEditor(options)
