"""MEMIT against the formula in plain float64, and what its definition promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.edit.prefixes import generate_prefixes
from graftwork.edit.reading import layer_point
from graftwork.edit.sites import find_sites
from graftwork.edit.target import StateOptions, optimise_state
from graftwork.testing.editing import REQUESTS, corpus, editable_model, same_bits, weights
from graftwork_editing_baselines.memit import Memit

STATE = {"steps": 6, "lr": 0.2, "decay": 0.0, "clamp": 2.0, "prefixes": 2, "prefix_tokens": 3, "stop": 0.0}
LAM = 0.5


def seen(model: Any, ids: torch.Tensor, module: Any, *, output: bool) -> torch.Tensor:
    """Return a module's input or output for one sequence, the plain way (tokens x dim, float64)."""
    found: list[torch.Tensor] = []

    def hook(_: Any, args: Any, out: Any) -> None:
        value = out if output else args[0]
        found.append((value if torch.is_tensor(value) else value[0])[0])

    handle = module.register_forward_hook(hook)
    with torch.no_grad():
        model(input_ids=ids[None])
    handle.remove()
    return found[0].double()


def reference(model: Any, tokenizer: Any, layers: list[int]) -> dict[str, torch.Tensor]:
    """Return dW by site: MEMIT with inverses in float64, written by hand; ``model`` is left edited."""
    options = StateOptions.model_validate(STATE)
    openings = generate_prefixes(model, tokenizer, 2, 3, 0)
    sites = find_sites(model, ["mlp"], layers)
    moments = []
    for site in sites:
        x = torch.cat([seen(model, row, site.module, output=False) for row in corpus()])
        moments.append(x.T @ x / len(x))
    last = model.get_submodule(f"model.layers.{layers[-1]}")

    def tokens(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text)["input_ids"])

    def at(prefix: str, one: Any) -> int:
        # Bytes are tokens: the last byte of the subject.
        return len((prefix + one.prompt.split("{}")[0] + one.subject).encode()) - 1

    def state(one: Any) -> torch.Tensor:
        return seen(model, tokens(one.text), last, output=True)[at("", one)]

    wanted = torch.stack(
        [
            state(one)
            + next(
                iter(
                    optimise_state(
                        model, tokenizer, one, layer_point(model, layers[-1]), options, openings
                    ).delta.values()
                )
            ).double()
            for one in REQUESTS
        ]
    )
    found = {}
    for number, (site, moment) in enumerate(zip(sites, moments, strict=True)):
        residuals = (wanted - torch.stack([state(one) for one in REQUESTS])) / (len(sites) - number)
        keys = []
        for one in REQUESTS:
            mine = [
                seen(model, tokens(prefix + one.text), site.module, output=False)[at(prefix, one)]
                for prefix in ("", *openings)
            ]
            keys.append(mine[0] / 2 + (mine[1] + mine[2]) / 4)
        k = torch.stack(keys).T
        ridge = 1e-6 * LAM * moment.trace() / site.d * torch.eye(site.d, dtype=torch.float64)
        delta = residuals.T @ k.T @ torch.linalg.inv(LAM * moment + ridge + k @ k.T)
        with torch.no_grad():
            site.matrix.add_(delta)
        found[site.name] = delta
    return found


def test_it_is_the_formula(edit: Any, tokenizer: Any) -> None:
    edits = edit(Memit, editable_model(), layers=[0, 1], lam=LAM, state=STATE)
    wanted = reference(editable_model(), tokenizer, [0, 1])
    assert set(edits.changes) == set(wanted)
    for name, delta in wanted.items():
        error = float((edits.changes[name].dense() - delta).norm() / delta.norm())
        # States are read in float32, in batches of another shape.
        assert error < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_the_states_are_reached_and_the_model_comes_back(edit: Any, kind: str) -> None:
    model = editable_model(kind)
    before = weights(model)
    state = {**STATE, "prefixes": 0}
    near = edit(Memit, model, layers=[1], lam=1e-3, state=state)
    assert same_bits(model, before)
    # A weight of the corpus that lets nothing be written leaves all there was to do.
    far = edit(Memit, model, layers=[1], lam=1e9, state=state)
    for left, whole in zip(near.report["left"], far.report["left"], strict=True):
        assert left < 0.1 * whole
    assert near.report["layers"] == [1]
    assert all(0 < one["gain"] <= 1 for one in near.report["sites"].values())


def test_the_order_of_requests_does_not_matter(edit: Any) -> None:
    first = edit(Memit, editable_model(), layers=[0, 1], lam=LAM, state=STATE)
    second = edit(Memit, editable_model(), list(reversed(REQUESTS)), layers=[0, 1], lam=LAM, state=STATE)
    for name, change in first.changes.items():
        delta = change.dense()
        # Float32 states of a batch in another order.
        assert float((second.changes[name].dense() - delta).norm() / delta.norm()) < 1e-4


def test_the_same_input_gives_the_same_bytes(edit: Any) -> None:
    one, two = (edit(Memit, editable_model(), layers=[0, 1], state=STATE) for _ in range(2))
    assert one.to_bytes() == two.to_bytes()


def test_a_larger_weight_of_the_corpus_writes_less(edit: Any) -> None:
    sizes = []
    for lam in (0.01, 1.0, 100.0):
        edits = edit(Memit, editable_model(), layers=[1], lam=lam, state=STATE)
        sizes.append(edits.report["sites"]["model.layers.1.mlp.down_proj"]["share"])
    assert sizes[0] > sizes[1] > sizes[2]


def test_the_band_is_the_references_where_none_is_named(edit: Any) -> None:
    edits = edit(Memit, editable_model(num_hidden_layers=14), state=STATE, lam=1.0)
    # Layers 3 to 8 of 28, at half the depth.
    assert edits.report["layers"] == [2, 3, 4]


@pytest.mark.parametrize(
    ("layers", "words"),
    [([9], "layers 0 to 3, so no layer 9"), ([1, 1], "each layer once"), ([], "one at least")],
)
def test_layers_are_checked(edit: Any, layers: list[int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        edit(Memit, editable_model(), layers=layers)
