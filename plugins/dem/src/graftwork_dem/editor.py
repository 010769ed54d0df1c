"""DEM as an editor: places per request, a target state, and closed-form writes in depth order. The equations are ours.

    r_e = (z_e - h_e) pi_e(l, m) / (sum of pi_e over this and deeper sites),   h_e: the state as it is by now
    dW = R K^T (lam C + K K^T + eps I)^-1

K holds the keys of the requests that chose the site; with ``protect`` those of all others, too, with residual zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from graftwork.console import Console
from graftwork.edit.draft import Draft
from graftwork.edit.edits import EditSet
from graftwork.edit.prefixes import generate_prefixes
from graftwork.edit.reading import keys, layer_point, states
from graftwork.edit.requests import Request
from graftwork.edit.sites import KINDS, Site, find_sites
from graftwork.edit.solve import Update, solve_update
from graftwork.edit.statistics import Provider
from graftwork.edit.target import State, optimise_state

from graftwork_dem.events import commonsense
from graftwork_dem.locate import Located, generator, locate, places
from graftwork_dem.passes import noise_scale
from graftwork_dem.select import Place, remaining_share
from graftwork_dem.settings import DemOptions

Omega = Mapping[Place, float]


class DemEditor:
    """Finds for every request its own places in attention and MLP, and writes there."""

    name = "dem"
    uses_statistics = True

    def __init__(self, options: DemOptions) -> None:
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
        """See :class:`graftwork.edit.editor.Editor`.

        Raises:
            LocalizationError: a request for which no place has a positive score.
            StatsError, UnsafeEditError: see :mod:`graftwork.edit.solve` and :mod:`graftwork.edit.draft`.
        """
        options = self.options
        sites = find_sites(model)
        located = self._located(model, tokenizer, requests, sites, console, seed)
        chosen = places(located, options.locate, self._donors(model, tokenizer, located, sites, seed))
        wanted = {place for omega in chosen for place in omega}
        written = [site for site in sites if (site.layer, site.kind) in wanted]
        statistics.collect(written)
        prefixes = generate_prefixes(
            model, tokenizer, options.state.prefixes, options.state.prefix_tokens, seed
        )
        deepest = [max(layer for layer, _ in omega) for omega in chosen]
        found: list[State] = []
        with console.bar(len(requests), "target states", "request") as bar:
            for request, layer in zip(requests, deepest, strict=True):
                point = layer_point(model, layer)
                found.append(optimise_state(model, tokenizer, request, point, options.state, prefixes))
                bar.update(1)
        targets = [next(iter(state.target.values())).double() for state in found]
        with Draft(model, written, max_share=options.max_share) as draft:
            with console.bar(len(written), "writes", "site") as bar:
                for site in written:
                    update = self._update(
                        model, tokenizer, requests, site, chosen, deepest, targets, prefixes, statistics
                    )
                    draft.write(site, update)
                    bar.update(1)
            report = {
                "requests": [
                    _row(one, omega, state) for one, omega, state in zip(located, chosen, found, strict=True)
                ]
            }
            return draft.edit_set(
                self.name, self.name, requests, options.model_dump(exclude={"requests"}), report
            )

    def _located(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[Request],
        sites: Sequence[Site],
        console: Console,
        seed: int,
    ) -> list[Located]:
        options = self.options.locate
        std = noise_scale(model)
        found = []
        with console.bar(len(requests), "places", "request") as bar:
            for request in requests:
                found.append(locate(model, tokenizer, request, sites, options, seed=seed, std=std))
                bar.update(1)
        return found

    def _donors(
        self, model: Any, tokenizer: Any, located: Sequence[Located], sites: Sequence[Site], seed: int
    ) -> Sequence[Located]:
        """Return whose places each request gets in mode ``other``: the next one's, or an event of ours."""
        if self.options.locate.mode != "other":
            return ()
        if len(located) > 1:
            return [*located[1:], located[0]]
        (only,) = located
        others = [one for one in commonsense() if one.subject != only.request.subject]
        draw = generator(seed, "donor", only.request.id)
        donor = others[int(torch.randint(len(others), (1,), generator=draw))]
        return [locate(model, tokenizer, donor, sites, self.options.locate, seed=seed)]

    def _update(
        self,
        model: Any,
        tokenizer: Any,
        requests: Sequence[Request],
        site: Site,
        chosen: Sequence[Omega],
        deepest: Sequence[int],
        targets: Sequence[torch.Tensor],
        prefixes: Sequence[str],
        statistics: Provider,
    ) -> Update:
        """Return what is written to ``site`` with the weights as they are by now."""
        options = self.options
        place: Place = (site.layer, site.kind)
        members = [number for number, omega in enumerate(chosen) if place in omega]
        others = (
            [number for number in range(len(requests)) if number not in members] if options.protect else []
        )
        now: dict[int, torch.Tensor] = {}
        for layer in sorted({deepest[number] for number in members}):
            mine = [number for number in members if deepest[number] == layer]
            found = states(model, tokenizer, [requests[number] for number in mine], layer)
            now.update(zip(mine, found, strict=True))
        residuals = [
            (targets[number] - now[number]) * remaining_share(chosen[number], place) for number in members
        ]
        order = [*members, *others]
        key_rows = keys(
            model,
            tokenizer,
            [requests[number] for number in order],
            [site],
            prefixes,
            variants=options.state.variants,
            average=options.average,
        )[site.name]
        left = torch.stack(residuals + [torch.zeros_like(residuals[0])] * len(others), 1)
        update = solve_update(left, key_rows.T, statistics.factor(site, options.lam, options.ridge))
        # Columns of protected requests have done their work in the solve; their residuals are zero.
        count = len(members)
        return Update(update.left[:, :count], update.right[:, :count], update.gain[:count], update.condition)


def _row(one: Located, omega: Omega, state: State) -> dict[str, Any]:
    """Return what the report says of one request."""
    return {
        "id": one.request.id,
        "sites": {f"{kind}.{layer}": weight for (layer, kind), weight in omega.items()},
        "gains": {
            kind: [round(float(value), 6) for value in one.gains[:, place]]
            for place, kind in enumerate(KINDS)
        },
        "loss": [state.losses[0], state.losses[-1]],
        "steps": len(state.losses),
    }
