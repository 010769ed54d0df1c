"""ROME (Meng et al., NeurIPS 2022): one fact, one MLP, a rank-one update that gives its key exactly the new value.

    dW = (v* - W k) (C^-1 k)^T / (k^T C^-1 k)

One key everywhere, the mean over prefixes: with the bare prompt's key in the numerator, as in the reference, models
collapse (R-ROME). Several requests are written one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftwork.console import Console
from graftwork.edit.draft import Draft
from graftwork.edit.edits import EditSet
from graftwork.edit.plugin import EditOptions, EditPlugin
from graftwork.edit.prefixes import generate_prefixes
from graftwork.edit.reading import keys
from graftwork.edit.requests import Request
from graftwork.edit.sites import find_sites
from graftwork.edit.solve import RIDGE, rank_one
from graftwork.edit.statistics import Provider
from graftwork.edit.target import StateOptions, optimise_state
from pydantic import Field

from graftwork_editing_baselines.band import band


class RomeState(StateOptions):
    """How the value is found; the defaults of ROME for GPT-J."""

    steps: int = Field(20, ge=1, description="forward passes at most; one fewer steps of Adam")
    clamp: float = Field(4.0, gt=0, description="largest ||delta|| / ||v||")


class RomeOptions(EditOptions):
    """Options of ROME."""

    layer: int | None = Field(
        None, ge=0, description="layer to write to; that of the reference for GPT-J, 5 of 28, if not set"
    )
    ridge: float = Field(RIDGE, ge=0, description="share of the mean of C that is added to its diagonal")
    state: RomeState = Field(default_factory=lambda: RomeState.model_validate({}))


class RomeEditor:
    """ROME as an editor."""

    name = "rome"
    uses_statistics = True

    def __init__(self, options: RomeOptions) -> None:
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
        named = None if options.layer is None else [options.layer]
        (layer,) = band(model, named, 5 / 28, 5 / 28, self.name)
        (site,) = find_sites(model, ["mlp"], [layer])
        statistics.collect([site])
        openings = generate_prefixes(
            model, tokenizer, options.state.prefixes, options.state.prefix_tokens, seed
        )
        factor = statistics.factor(site, 1.0, options.ridge)
        bias: Any = site.module.bias
        steps = []
        with (
            Draft(model, [site], max_share=options.max_share) as draft,
            console.bar(len(requests), "rome", "request") as bar,
        ):
            for request in requests:
                state = optimise_state(
                    model, tokenizer, request, {site.name: site.module}, options.state, openings
                )
                (mine,) = keys(model, tokenizer, [request], [site], openings).values()
                key = mine[0]
                value = state.target[site.name].double()
                if bias is not None:
                    value = value - bias.detach().double().cpu()
                residual = value - site.matrix.double().cpu() @ key
                draft.write(site, rank_one(residual, key, factor))
                steps.append(len(state.losses))
                bar.update(1)
            report: dict[str, Any] = {"layer": layer, "steps": steps}
            return draft.edit_set(self.name, self.name, requests, options.model_dump(), report)


class Rome(EditPlugin):
    """ROME as a plugin."""

    name = "rome"
    Options = RomeOptions

    @classmethod
    def editor(cls, options: RomeOptions) -> RomeEditor:
        return RomeEditor(options)
