"""For tests of edits: a tiny model whose MLPs matter, requests, and a plain editor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graftwork.console import Console
from graftwork.edit.draft import Draft
from graftwork.edit.edits import EditSet
from graftwork.edit.reading import keys, layer_point, states
from graftwork.edit.requests import Probe, Request
from graftwork.edit.sites import Kind, find_sites
from graftwork.edit.solve import solve_update
from graftwork.edit.statistics import Provider
from graftwork.edit.target import StateOptions, optimise_state
from graftwork.testing.models import tiny_model

STATE = StateOptions.model_validate(
    {"steps": 8, "lr": 0.2, "decay": 0.0, "clamp": 4.0, "prefixes": 0, "stop": 0.0}
)
REQUESTS = [
    Request(
        "lyon",
        "{} is in",
        "Lyon",
        "Rome",
        "Gaul",
        variants=("Bonn",),
        paraphrases=("One finds Lyon in",),
        neighbors=(Probe("Nice is in", "Gaul"),),
        locality=(Probe("Water is"),),
    ),
    Request("oslo", "The town of {} lies in", "Oslo", "Peru", "Norway"),
]


def editable_model(
    kind: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """Return a tiny model of four layers with weights so large that its layers do something."""
    depth = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    return tiny_model(kind, seed=seed, dtype=dtype, **{depth: 4, "initializer_range": 0.25, **changes})


def corpus(seed: int = 0, windows: int = 32, window: int = 32) -> torch.Tensor:
    """Return random tokens of the tiny tokenizer (windows x window)."""
    return torch.randint(3, 259, (windows, window), generator=torch.Generator().manual_seed(seed))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of a model's parameters."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same_bits(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    """Return whether a model has exactly these parameters, down to the sign of zeros."""
    return all(
        torch.equal(value.detach().view(torch.uint8), before[name].view(torch.uint8))
        for name, value in model.named_parameters()
    )


class PlainEditor:
    """Least squares at some sites of one layer for a state behind it; as plain as an editor can be.

    Args:
        layer: that is edited.
        lam: weight of the second moments.
        state: how the state is found; ``stop`` above any loss finds nothing to change.
    """

    name = "plain"
    uses_statistics = True

    def __init__(
        self,
        layer: int = 1,
        lam: float = 1.0,
        state: StateOptions = STATE,
        kinds: Sequence[Kind] = ("mlp",),
        max_share: float = 10.0,
    ) -> None:
        self.layer, self.lam, self.state, self.kinds, self.max_share = layer, lam, state, kinds, max_share

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
        sites = find_sites(model, self.kinds, [self.layer])
        statistics.collect(sites)
        point = layer_point(model, self.layer)
        found = [optimise_state(model, tokenizer, one, point, self.state) for one in requests]
        delta = torch.stack([next(iter(one.delta.values())).double() for one in found])
        wanted = states(model, tokenizer, requests, self.layer) + delta
        with Draft(model, sites, max_share=self.max_share) as draft:
            for number, site in enumerate(sites):
                missing = wanted - states(model, tokenizer, requests, self.layer)
                (mine,) = keys(model, tokenizer, requests, [site]).values()
                factor = statistics.factor(site, self.lam)
                draft.write(site, solve_update(missing.T / (len(sites) - number), mine.T, factor))
            return draft.edit_set(self.name, self.name, requests, {"lam": self.lam})
