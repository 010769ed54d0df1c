"""The target state: it makes the target likelier, stays in its bounds, and leaves the model alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from graftwork.edit.encoding import pad, rows_of
from graftwork.edit.errors import LocalizationError
from graftwork.edit.prefixes import generate_prefixes
from graftwork.edit.reading import keys, layer_point, read, states
from graftwork.edit.scoring import score
from graftwork.edit.sites import find_sites
from graftwork.edit.target import adding, optimise_state
from graftwork.testing.editing import REQUESTS, STATE, editable_model, same_bits, weights


def likely(model: Any, tokenizer: Any, deltas: dict[str, torch.Tensor]) -> float:
    rows = rows_of(tokenizer, REQUESTS[0])
    points = {name: model.get_submodule(name) for name in deltas}
    with adding(points, deltas, pad(rows, tokenizer, model).anchors):
        return score(model, tokenizer, rows)[0].mean


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_target_becomes_likelier_and_the_model_stays(kind: str, tokenizer: Any) -> None:
    model = editable_model(kind)
    flags = [value.requires_grad for value in model.parameters()]
    before = weights(model)
    points = layer_point(model, 1)
    (name,) = points
    state = optimise_state(model, tokenizer, REQUESTS[0], points, STATE, ["Ah. "])
    assert likely(model, tokenizer, dict(state.delta)) > likely(model, tokenizer, {name: torch.zeros(32)})
    assert state.losses[-1] < state.losses[0]
    assert same_bits(model, before)
    assert [value.requires_grad for value in model.parameters()] == flags
    assert all(value.grad is None for value in model.parameters())
    assert not points[name]._forward_hooks
    # What was seen without it is what it starts from.
    torch.testing.assert_close(
        state.clean[name].double(), states(model, tokenizer, REQUESTS[:1], 1)[0], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(state.target[name], state.clean[name] + state.delta[name])


def test_the_delta_keeps_to_its_clamp(model: Any, tokenizer: Any) -> None:
    for clamp in (0.1, 0.5):
        options = STATE.model_copy(update={"clamp": clamp, "lr": 5.0})
        state = optimise_state(model, tokenizer, REQUESTS[0], layer_point(model, 1), options)
        (delta,), (clean,) = state.delta.values(), state.clean.values()
        assert float(delta.norm()) == pytest.approx(clamp * float(clean.norm()), rel=1e-4)


def test_it_stops_where_the_loss_is_low_enough(model: Any, tokenizer: Any) -> None:
    options = STATE.model_copy(update={"stop": 100.0})
    state = optimise_state(model, tokenizer, REQUESTS[0], layer_point(model, 1), options)
    assert len(state.losses) == 1
    assert not next(iter(state.delta.values())).any()


def test_the_divergence_holds_the_subject_in_place(model: Any, tokenizer: Any) -> None:
    def moved(weight: float) -> float:
        options = STATE.model_copy(update={"kl": weight, "steps": 15})
        state = optimise_state(model, tokenizer, REQUESTS[0], layer_point(model, 1), options)
        return float(next(iter(state.delta.values())).norm())

    assert moved(1000.0) < 0.8 * moved(0.0)


def test_two_points_are_found_together(model: Any, tokenizer: Any) -> None:
    sites = find_sites(model, layers=[1])
    points = {site.name: site.module for site in sites}
    state = optimise_state(model, tokenizer, REQUESTS[0], points, STATE)
    assert set(state.delta) == set(points)
    assert all(delta.any() for delta in state.delta.values())


def test_variants_pull_too(model: Any, tokenizer: Any) -> None:
    options = STATE.model_copy(update={"variants": 1})
    first = optimise_state(model, tokenizer, REQUESTS[0], layer_point(model, 1), options).losses[0]
    rows = rows_of(tokenizer, REQUESTS[0], variants=1)
    assert first == pytest.approx(-sum(one.mean for one in score(model, tokenizer, rows)) / 2, abs=1e-4)


def test_exceptions_leave_nothing_behind(model: Any, tokenizer: Any) -> None:
    before = weights(model)
    with pytest.raises(LocalizationError, match=r"'lyon'.*model.layers.3 cannot reach the target"):
        optimise_state(model, tokenizer, REQUESTS[0], layer_point(model, 3), STATE)
    assert same_bits(model, before)
    assert all(value.requires_grad for value in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[0] = torch.nan
    with pytest.raises(Exception, match=r"'lyon'.*no number after 0 steps"):
        optimise_state(broken, tokenizer, REQUESTS[0], layer_point(broken, 1), STATE)


def test_keys_are_means_of_what_the_site_reads(model: Any, tokenizer: Any) -> None:
    (site,) = find_sites(model, ["mlp"], [1])
    prefixes = ["Ah. ", "And yet. "]
    rows = rows_of(tokenizer, REQUESTS[0], prefixes, variants=1, target=False)
    alone = torch.cat(
        [read(model, tokenizer, [row], inputs={"k": site.module})["k"] for row in rows]
    ).double()
    weight = torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6], dtype=torch.float64)
    (found,) = keys(model, tokenizer, REQUESTS[:1], [site], prefixes, variants=1).values()
    torch.testing.assert_close(found[0], weight @ alone, atol=1e-5, rtol=1e-5)
    (found,) = keys(model, tokenizer, REQUESTS[:1], [site], prefixes, variants=1, average="mean").values()
    torch.testing.assert_close(found[0], alone.mean(0), atol=1e-5, rtol=1e-5)
    (last,) = read(model, tokenizer, rows[:1], inputs={"k": site.module}, anchor="last").values()
    assert not torch.allclose(last, alone[:1].float(), atol=1e-3)


def test_openings_are_the_same_for_one_seed(model: Any, tokenizer: Any) -> None:
    first = generate_prefixes(model, tokenizer, 3, 4, seed=1)
    assert first == generate_prefixes(model, tokenizer, 3, 4, seed=1)
    assert first != generate_prefixes(model, tokenizer, 3, 4, seed=2)
    assert len(first) == 3
    assert all(one.endswith(". ") and "\n" not in one for one in first)
    assert first[0].startswith("The")
    assert generate_prefixes(model, tokenizer, 0) == ()
