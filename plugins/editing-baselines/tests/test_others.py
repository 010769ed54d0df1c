"""ROME, PMET, AlphaEdit and constrained fine-tuning: what their definitions promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from graftwork.edit.encoding import encode_request
from graftwork.edit.errors import StatsError
from graftwork.edit.prefixes import generate_prefixes
from graftwork.edit.reading import keys
from graftwork.edit.scoring import score
from graftwork.edit.sites import find_sites
from graftwork.edit.statistics import Statistics
from graftwork.testing.editing import REQUESTS, corpus, editable_model, same_bits, weights
from graftwork_editing_baselines.alphaedit import AlphaEdit, AlphaEditOptions, null_basis, null_space_update
from graftwork_editing_baselines.fine_tuning import FineTuning
from graftwork_editing_baselines.memit import Memit
from graftwork_editing_baselines.pmet import Pmet
from graftwork_editing_baselines.rome import Rome
from hypothesis import given, settings
from hypothesis import strategies as st

STATE = {"steps": 6, "lr": 0.2, "decay": 0.0, "clamp": 2.0, "prefixes": 2, "prefix_tokens": 3, "stop": 0.0}
# For tests whose question is whether the edit does what its state promised.
STRONG = {**STATE, "steps": 25, "lr": 0.5, "prefixes": 0, "kl": 0.0}
ALL = {
    "rome": (Rome, {"layer": 1, "state": STRONG}),
    "memit": (Memit, {"layers": [0, 1], "lam": 1e-3, "state": STRONG}),
    "pmet": (Pmet, {"layers": [0, 1], "lam": 1e-3, "write": "both", "state": STRONG}),
    "alphaedit": (AlphaEdit, {"layers": [0, 1], "rho": 0.5, "l2": 1e-6, "state": STRONG}),
    "ft": (FineTuning, {"layer": 2, "lr": 1e-2, "clamp": None}),
}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ALL)
def test_every_editor_helps_its_targets_and_leaves_the_model(
    edit: Any, tokenizer: Any, name: str, kind: str
) -> None:
    plugin, options = ALL[name]
    model = editable_model(kind)
    before = weights(model)
    flags = [value.requires_grad for value in model.parameters()]
    names = [key for key, _ in model.named_parameters()]
    edits = edit(plugin, model, **options)
    assert same_bits(model, before)
    assert [value.requires_grad for value in model.parameters()] == flags
    assert [key for key, _ in model.named_parameters()] == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    rows = [encode_request(tokenizer, one) for one in REQUESTS]
    old = [one.mean for one in score(model, tokenizer, rows)]
    with edits.apply(model):
        new = [one.mean for one in score(model, tokenizer, rows)]
    assert sum(new) > sum(old)
    assert edits.parts[0].method == name == plugin.name


# ---------------------------------------------------------------------- ROME


def test_rome_gives_its_key_the_wanted_value(edit: Any, tokenizer: Any) -> None:
    for kind in ("llama", "gpt2"):
        model = editable_model(kind)
        (site,) = find_sites(model, ["mlp"], [1])
        edits = edit(Rome, model, REQUESTS[:1], layer=1, state=STATE)
        openings = generate_prefixes(model, tokenizer, 2, 3, 0)
        (key,) = keys(model, tokenizer, REQUESTS[:1], [site], openings).values()
        change = edits.changes[site.name]
        # All of the residual, and in no direction that C^-1 k has no part in.
        torch.testing.assert_close(change.dense() @ key[0], change.left[:, 0].double(), rtol=1e-5, atol=1e-6)
        moment = Statistics(model, tokenizer, corpus()).moment(site)
        eps = 1e-6 * moment.trace() / site.d
        direction = torch.linalg.solve(moment + eps * torch.eye(site.d, dtype=torch.float64), key[0])
        cosine = torch.nn.functional.cosine_similarity(change.right[:, 0].double(), direction, dim=0)
        assert float(cosine) == pytest.approx(1.0, abs=1e-6)


def test_memit_at_one_site_tends_to_romes_direction(edit: Any, tokenizer: Any) -> None:
    model = editable_model()
    rome = edit(Rome, model, REQUESTS[:1], layer=1, state=STATE).changes["model.layers.1.mlp.down_proj"]
    memit = edit(Memit, model, REQUESTS[:1], layers=[1], lam=1e-4, state=STATE).changes[
        "model.layers.1.mlp.down_proj"
    ]
    cosine = torch.nn.functional.cosine_similarity(rome.right[:, 0], memit.right[:, 0], dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-5)


# ---------------------------------------------------------------------- PMET


def test_pmet_writes_what_it_is_told_to(edit: Any) -> None:
    mlp = edit(Pmet, editable_model(), layers=[0, 1], lam=0.01, state=STATE)
    assert list(mlp.changes) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    both = edit(Pmet, editable_model(), layers=[0, 1], lam=0.01, write="both", state=STATE)
    assert [name.rpartition(".")[2] for name in both.changes] == ["o_proj", "down_proj"] * 2


def test_pmet_writes_the_root_of_the_share(edit: Any) -> None:
    model = editable_model()
    pmet = edit(Pmet, model, REQUESTS[:1], layers=[0, 1], lam=0.01, state=STATE)
    # Nothing was written before the first layer: its residual is the whole delta over sqrt(2).
    alone = edit(Pmet, model, REQUESTS[:1], layers=[1], lam=0.01, state=STATE)
    first = pmet.changes["model.layers.0.mlp.down_proj"].left
    whole = alone.changes["model.layers.1.mlp.down_proj"].left
    torch.testing.assert_close(first * math.sqrt(2), whole, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- AlphaEdit


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(0, 4))
def test_alphaedit_solves_the_references_system(seed: int, n: int, old: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h, d, l2 = 3, 8, 0.7
    x = draw(40, d) * torch.logspace(0, -2, d, dtype=torch.float64)
    basis = null_basis(x.T @ x / 40, 0.3)
    residuals, now = draw(h, n), draw(d, n)
    earlier = draw(d, old) if old else None
    found = null_space_update(residuals, now, earlier, basis, l2).dense()
    p = basis @ basis.T
    moments = now @ now.T + (earlier @ earlier.T if earlier is not None else 0)
    wanted = torch.linalg.solve(p @ moments + l2 * torch.eye(d, dtype=torch.float64), p @ now @ residuals.T).T
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found @ p, found, rtol=1e-8, atol=1e-12)


def test_the_null_space_is_the_smallest_directions_within_their_share() -> None:
    moment = torch.diag(torch.tensor([5.0, 1.0, 3.0, 1.0], dtype=torch.float64))
    basis = null_basis(moment, 0.2)
    assert basis.shape == (4, 2)
    torch.testing.assert_close(
        (basis @ basis.T).diagonal(), torch.tensor([0.0, 1, 0, 1], dtype=torch.float64)
    )
    with pytest.raises(StatsError, match=r"holds as little as 0.02"):
        null_basis(torch.eye(4, dtype=torch.float64), 0.02)


def test_alphaedit_remembers_the_keys_that_the_weights_hold(edit: Any, tokenizer: Any) -> None:
    model = editable_model()
    options = AlphaEditOptions.model_validate({**ALL["alphaedit"][1], "max_share": 50.0, "layers": [1]})
    name = "model.layers.1.mlp.down_proj"
    editor = AlphaEdit.editor(options)
    statistics = Statistics(model, tokenizer, corpus())
    statistics.collect(find_sites(model, ["mlp"], [1]))

    def again(editor: Any) -> torch.Tensor:
        from graftwork.console import Console

        made = editor.edit(model, tokenizer, REQUESTS[1:], statistics, console=Console(enabled=False), seed=0)
        return made.changes[name].right

    first = edit(AlphaEdit, model, REQUESTS[:1], editor=editor)
    with first.apply(model):
        protected, fresh = again(editor), again(AlphaEdit.editor(options))
        (key,) = keys(model, tokenizer, REQUESTS[:1], find_sites(model, ["mlp"], [1])).values()
    moved = (protected.T.double() @ key[0]).norm(), (fresh.T.double() @ key[0]).norm()
    assert float(moved[0]) < 0.01 * float(moved[1])
    # Taken back, they are forgotten.
    torch.testing.assert_close(again(editor), again(AlphaEdit.editor(options)))


# ---------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_weight_moves_further_than_the_clamp(edit: Any, kind: str) -> None:
    edits = edit(FineTuning, editable_model(kind), layer=2, lr=1e-2, clamp=3e-3, steps=8)
    (change,) = edits.changes.values()
    largest = float(change.dense().abs().max())
    assert largest == pytest.approx(3e-3, rel=1e-6)
    losses = edits.report["losses"]
    assert losses[-1] < losses[0]


def test_fine_tuning_is_adam_on_the_weight(edit: Any, tokenizer: Any) -> None:
    for kind in ("llama", "gpt2"):
        edits = edit(FineTuning, editable_model(kind), layer=2, lr=1e-3, clamp=1e-3, steps=3, stop=0.0)
        model = editable_model(kind)
        (site,) = find_sites(model, ["mlp"], [2])
        weight: Any = site.module.weight
        original = site.matrix.clone()
        start = weight.detach().clone()
        adam = torch.optim.Adam([weight], lr=1e-3)
        for _ in range(3):
            adam.zero_grad()
            loss = torch.zeros(())
            for one in REQUESTS:
                ids = torch.tensor(tokenizer(f"{one.text} {one.target}")["input_ids"])
                labels = ids.clone()
                labels[: len(tokenizer(one.text)["input_ids"])] = -100
                loss = loss + model(input_ids=ids[None], labels=labels[None]).loss / len(REQUESTS)
            loss.backward()
            adam.step()
            with torch.no_grad():
                weight.copy_(torch.clamp(weight, start - 1e-3, start + 1e-3))
        delta = edits.changes[site.name].dense().float()
        error = (delta - (site.matrix - original)).norm() / delta.norm()
        assert float(error) < 5e-2


def test_ft_l_learns_all_tokens_at_the_last_prompt_token(edit: Any, tokenizer: Any) -> None:
    def learned(loss: str) -> tuple[float, float]:
        model = editable_model()
        edits = edit(FineTuning, model, REQUESTS[:1], layer=2, lr=3e-2, clamp=None, steps=40, loss=loss)
        with edits.apply(model):
            found = score(model, tokenizer, [encode_request(tokenizer, REQUESTS[0])])[0]
        return found.mean, edits.report["losses"][-1]

    right, wrong = learned("m"), learned("l")
    # Its own loss cannot fall below the entropy of the target's five different bytes.
    assert wrong[1] >= math.log(5) - 1e-3
    assert right[1] < wrong[1]
    assert right[0] > wrong[0]
