"""The editor: MEMIT and ROME as special cases, protection, order, controls, and a model that is left as it was."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from graftwork.console import Console
from graftwork.edit.edits import EditSet
from graftwork.edit.errors import LocalizationError, UnsafeEditError
from graftwork.edit.prefixes import generate_prefixes
from graftwork.edit.reading import keys, layer_point, states
from graftwork.edit.requests import Request
from graftwork.edit.sites import Site, find_sites, oriented
from graftwork.edit.statistics import IdentityStatistics, Statistics
from graftwork.edit.target import StateOptions, optimise_state
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork_dem.editor import DemEditor
from graftwork_dem.events import commonsense
from graftwork_dem.settings import DemOptions

TOKENIZER = tiny_tokenizer()
QUIET = Console(enabled=False)
STATE = {"steps": 4, "prefixes": 1, "prefix_tokens": 3, "variants": 1}
EVENTS = commonsense(3)
PLACED: dict[str, Any] = {"initializer_range": 0.3, "seed": 5}
"""A model in which every one of the events has places of both kinds."""


def model_of(kind: str = "llama", **changes: Any) -> Any:
    layers = {"gpt2": "n_layer"}.get(kind, "num_hidden_layers")
    return tiny_model(kind, **{"initializer_range": 0.1, layers: 4, **changes})


def editor(*, lam: float = 1e-2, locate: dict[str, Any] | None = None, **options: Any) -> DemEditor:
    given = {
        "lam": lam,
        "max_share": 100,
        "state": STATE,
        "locate": {"draws": 2, **(locate or {})},
        **options,
    }
    return DemEditor(DemOptions.model_validate(given))


def edit(
    model: Any,
    requests: Sequence[Request] = EVENTS,
    *,
    statistics: Any = None,
    seed: int = 0,
    **options: Any,
) -> EditSet:
    return editor(**options).edit(
        model, TOKENIZER, requests, statistics or IdentityStatistics(), console=QUIET, seed=seed
    )


def corpus(model: Any) -> torch.Tensor:
    return torch.randint(3, 259, (12, 32), generator=torch.Generator().manual_seed(3))


def prefixes_of(model: Any) -> tuple[str, ...]:
    return generate_prefixes(model, TOKENIZER, 1, 3, 0)


def memit(model: Any, layers: Sequence[int], lam: float, statistics: Any) -> dict[str, torch.Tensor]:
    """Plain MEMIT on ``model`` itself: dW = R K^T (lam C + K K^T)^-1 with R = (Z - H) / (layers left)."""
    prefixes = prefixes_of(model)
    sites = find_sites(model, ["mlp"], layers)
    statistics.collect(sites)
    moments = {site.name: statistics.moment(site) for site in sites}
    options = StateOptions.model_validate(STATE)
    z = []
    for request in EVENTS:
        found = optimise_state(model, TOKENIZER, request, layer_point(model, layers[-1]), options, prefixes)
        z.append(next(iter(found.target.values())).double())
    deltas = {}
    for number, site in enumerate(sites):
        residual = (torch.stack(z) - states(model, TOKENIZER, EVENTS, layers[-1])) / (len(sites) - number)
        found = keys(model, TOKENIZER, EVENTS, [site], prefixes, variants=1, average="groups")[site.name]
        matrix = lam * moments[site.name] + found.T @ found
        matrix += 1e-6 * lam * moments[site.name].trace() / site.d * torch.eye(site.d)
        deltas[site.name] = torch.linalg.solve(matrix, found.T @ residual).T
        with torch.no_grad():
            site.matrix.copy_((site.matrix.double() + deltas[site.name]).to(site.matrix.dtype))
    return deltas


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_fixed_band_of_mlps_with_even_shares_is_memit(
    kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(kind)
    other = copy.deepcopy(model)
    found = edit(
        model,
        lam=20.0,
        locate={"mode": "fixed", "sites": ["mlp.1", "mlp.2"]},
        average="groups",
        statistics=Statistics(model, TOKENIZER, corpus(model), folder=tmp_path / "a"),
    )
    wanted = memit(other, [1, 2], 20.0, Statistics(other, TOKENIZER, corpus(other), folder=tmp_path / "b"))
    assert set(found.changes) == set(wanted)
    for name, delta in wanted.items():
        assert relative(found.changes[name].dense(), delta) < 1e-6
        assert oriented(model.get_submodule(name)).shape == delta.shape


def one_site(model: Any, lam: float, tmp_path: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Site]:
    """Return dW of one edit at one site, its residual, its key and the site."""
    prefixes = prefixes_of(model)
    found = edit(
        model,
        EVENTS[:1],
        lam=lam,
        locate={"mode": "fixed", "sites": ["mlp.1"]},
        statistics=Statistics(model, TOKENIZER, corpus(model), folder=tmp_path),
        ridge=1e-12,
    )
    (site,) = find_sites(model, ["mlp"], [1])
    key = keys(model, TOKENIZER, EVENTS[:1], [site], prefixes, variants=1, average="mean")[site.name][0]
    state = optimise_state(
        model, TOKENIZER, EVENTS[0], layer_point(model, 1), StateOptions.model_validate(STATE), prefixes
    )
    z = next(iter(state.target.values())).double()
    return found.changes[site.name].dense(), z - states(model, TOKENIZER, EVENTS[:1], 1)[0], key, site


def test_one_edit_at_one_site_is_romes_rank_one_update_in_the_limit(tmp_path: Any) -> None:
    model = model_of()
    delta, residual, key, site = one_site(model, 1e-7, tmp_path)
    moment = Statistics(model, TOKENIZER, corpus(model), folder=tmp_path).moment(site)
    direction = torch.linalg.solve(moment, key)
    assert relative(delta, torch.outer(residual, direction) / (key @ direction)) < 1e-5


def test_the_share_of_the_residual_that_is_reached_is_c_over_lam_plus_c(tmp_path: Any) -> None:
    model = model_of()
    for lam in (20.0, 500.0):
        delta, residual, key, site = one_site(model, lam, tmp_path)
        moment = Statistics(model, TOKENIZER, corpus(model), folder=tmp_path).moment(site)
        c = float(key @ torch.linalg.solve(moment, key))
        assert 0.01 < c / (lam + c) < 0.99
        assert relative(delta @ key, residual * c / (lam + c)) < 1e-5
        assert torch.linalg.matrix_rank(delta.float(), rtol=1e-5) == 1


def first_write(model: Any, protect: bool) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Return dW of the first site, which requests chose it, and all keys there in the unedited model."""
    found = edit(
        model, lam=1e-9, locate={"n_sites": 1, "min_attn": 0, "min_mlp": 0}, protect=protect, ridge=1e-12
    )
    (name, *_) = found.parts[0].columns
    site = next(one for one in find_sites(model) if one.name == name)
    label = f"{site.kind}.{site.layer}"
    members = [i for i, row in enumerate(found.report["requests"]) if label in row["sites"]]
    values = keys(model, TOKENIZER, EVENTS, [site], prefixes_of(model), variants=1, average="mean")[name]
    return found.changes[name].dense(), members, values


def test_protected_requests_get_nothing_from_the_sites_of_others() -> None:
    shares = {}
    for protect in (True, False):
        delta, members, values = first_write(model_of(), protect)
        assert len(members) in (1, 2), "the requests must not all choose the same site"
        own = max(float((delta @ values[i]).norm()) for i in members)
        other = max(float((delta @ values[i]).norm()) for i in range(len(EVENTS)) if i not in members)
        shares[protect] = other / own
        assert delta.shape[1] == values.shape[1]
    assert shares[True] < 1e-4
    assert shares[False] > 1e-2


def test_the_order_of_a_batch_does_not_matter() -> None:
    model = model_of()
    options: dict[str, Any] = {"locate": {"scope": "batch", "n_sites": 3}}
    one, other = edit(model, EVENTS, **options), edit(model, EVENTS[::-1], **options)
    assert set(one.changes) == set(other.changes)
    assert len(one.changes) <= 3
    for name, change in one.changes.items():
        assert relative(other.changes[name].dense(), change.dense()) < 1e-5


def test_the_same_input_gives_the_same_bits_and_another_seed_other_places() -> None:
    model = model_of()
    again = [
        edit(model, EVENTS[:2], locate={"mode": "random", "n_sites": 2}, seed=seed) for seed in (1, 1, 2)
    ]
    one, other = again[0].tensors(), again[1].tensors()
    assert all(torch.equal(one[name], other[name]) for name in {*one, *other})
    rows = [one.report["requests"] for one in again]
    assert [row["sites"] for row in rows[0]] != [row["sites"] for row in rows[2]]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_weights_flags_and_hooks_are_as_before_and_an_edit_is_undone_bit_for_bit(kind: str) -> None:
    model = model_of(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    found = edit(model, locate={"n_sites": 2})

    def untouched() -> bool:
        return all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    assert untouched()
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    with found.apply(model):
        assert not untouched()
    assert untouched()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_edit_that_is_too_large_leaves_the_model_as_it_was() -> None:
    model = model_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsafeEditError, match="nothing was written"):
        edit(model, lam=1e-9, max_share=1e-4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_edit_makes_its_target_likelier() -> None:
    model = model_of(initializer_range=0.3)
    state = {**STATE, "steps": 15, "clamp": 4.0, "decay": 0.0}
    found = edit(model, EVENTS[:2], lam=1e-6, state=state, locate={"n_sites": 3})
    for row in found.report["requests"]:
        assert row["loss"][1] < row["loss"][0]
    from graftwork.edit.encoding import encode_request
    from graftwork.edit.scoring import score

    rows = [encode_request(TOKENIZER, one) for one in EVENTS[:2]]
    before = [one.mean for one in score(model, TOKENIZER, rows)]
    with found.apply(model):
        after = [one.mean for one in score(model, TOKENIZER, rows)]
    assert all(b > a for a, b in zip(before, after, strict=True))


def sites_of(found: EditSet) -> list[set[str]]:
    return [set(row["sites"]) for row in found.report["requests"]]


def test_kinds_depth_and_lists_are_kept_to() -> None:
    model = model_of(**PLACED)
    common = {"n_sites": 2, "min_attn": 0, "min_mlp": 0}
    for kind in ("attn", "mlp"):
        found = sites_of(edit(model, EVENTS, locate={"kinds": [kind], "l_max": 3, **common}))
        assert all(one.startswith(kind) for chosen in found for one in chosen)
    found = sites_of(edit(model, EVENTS, locate={"l_max": 1, **common}))
    assert all(int(one.rpartition(".")[2]) <= 1 for chosen in found for one in chosen)
    found = sites_of(edit(model, EVENTS, locate={"l_min": 1, "l_max": 2, "scope": "batch", **common}))
    assert all(1 <= int(one.rpartition(".")[2]) <= 2 for chosen in found for one in chosen)
    found = sites_of(edit(model, EVENTS, locate={"mode": "fixed", "sites": ["mlp.2", "attn.0"]}))
    assert found == [{"mlp.2", "attn.0"}] * 3


@pytest.mark.parametrize("mode", ["trace", "recall", "attribution"])
def test_every_mode_of_search_edits(mode: str) -> None:
    found = edit(
        model_of(**PLACED), EVENTS[:1], locate={"mode": mode, "n_sites": 2, "l_max": 3, "locate_variants": 1}
    )
    assert found.changes


def test_another_requests_sites_are_taken_from_the_next_one() -> None:
    model = model_of(initializer_range=0.3)
    own = sites_of(edit(model, EVENTS, locate={"n_sites": 2}))
    other = sites_of(edit(model, EVENTS, locate={"n_sites": 2, "mode": "other"}))
    assert other == [*own[1:], own[0]]
    # A single request gets those of an event that is not its own.
    assert len(sites_of(edit(model, EVENTS[:1], locate={"n_sites": 2, "mode": "other"}))) == 1


def test_a_site_that_is_not_there_is_told() -> None:
    with pytest.raises(LocalizationError, match=r"mlp\.9 is listed, and the model has layers 0 to 3"):
        edit(model_of(), locate={"mode": "fixed", "sites": ["mlp.9"]})


def test_scores_that_are_no_numbers_are_told() -> None:
    model = model_of()
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.down_proj").weight.fill_(float("nan"))
    with pytest.raises(LocalizationError, match="no number"):
        edit(model)
