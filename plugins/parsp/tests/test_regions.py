"""Equation (2): cores, entropy, and what the options make of them."""

from __future__ import annotations

import math

import pytest
import torch
from graftwork import UserError
from graftwork_parsp.regions import core_size, entropy, map_regions, normalised
from hypothesis import given, settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**31)


def shares(seed: int, m: int = 20) -> torch.Tensor:
    return normalised(torch.rand(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(2, 6))
def test_entropy_is_that_of_the_formula(seed: int, tasks: int) -> None:
    past = [shares(seed + n, 7) for n in range(tasks)]
    found = entropy(past)
    for j in range(7):
        p = [(r[j] / sum(q[j] for q in past)).item() for r in past]
        expected = -sum(x * math.log(x) for x in p if x) / math.log(tasks)
        assert found[j].item() == pytest.approx(expected, abs=1e-12)
    assert ((found >= 0) & (found <= 1)).all()
    torch.testing.assert_close(entropy(past[::-1]), found)


def test_entropy_at_its_ends() -> None:
    same = shares(1)
    torch.testing.assert_close(entropy([same] * 4), torch.ones(20).double())
    only = torch.tensor([0.0, 0.0, 1.0]).double()
    other = torch.tensor([1.0, 0.0, 0.0]).double()
    assert entropy([only, other])[2] == 0
    assert entropy([only, other])[1] == 0, "a neuron that no task needs is no generalist"
    assert torch.equal(entropy([same]), torch.zeros(20).double())


@pytest.mark.parametrize(
    ("density", "m", "n"),
    [(0.05, 1536, 76), (0.05, 11008, 550), (0.29, 100, 29), (1.0, 48, 48), (0.01, 48, 0)],
)
def test_core_sizes(density: float, m: int, n: int) -> None:
    assert core_size(density, m) == n


def test_the_core_is_the_most_relevant() -> None:
    own = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    found = map_regions({"a": own}, [], density=0.4, h=0.9)["a"]
    assert found.core.tolist() == [1, 3]
    assert found.generalist.tolist() == [False, False]


def test_generalists_are_those_above_h_and_may_be_left_out() -> None:
    own = torch.tensor([0.4, 0.3, 0.2, 0.1])
    before = torch.tensor([0.4, 0.0, 0.3, 0.3])
    h = entropy([before, own])
    assert h[0] == 1
    assert h[1] == 0
    both = map_regions({"a": own}, [{"a": before}], density=0.5, h=0.9)["a"]
    assert both.core.tolist() == [0, 1]
    assert both.generalist.tolist() == [True, False]
    torch.testing.assert_close(both.entropy, h)
    frozen = map_regions({"a": own}, [{"a": before}], density=0.5, h=0.9, generalist="freeze")["a"]
    assert frozen.core.tolist() == [1, 3]
    assert not frozen.generalist.any()
    with pytest.raises(UserError, match=r"task 'x': every neuron is generalist .* raise plugins.parsp.h"):
        map_regions({"a": own}, [{"a": own}], density=0.5, h=0.9, generalist="freeze", task="x")


def test_ranking_over_all_layers() -> None:
    layers = {"a": torch.tensor([0.7, 0.2, 0.1, 0.0]), "b": torch.tensor([0.26, 0.25, 0.25, 0.24])}
    found = map_regions(layers, [], density=0.5, h=1.0, select="global")
    assert {name: region.core.tolist() for name, region in found.items()} == {"a": [0], "b": [0, 1, 2]}
    found = map_regions(layers, [], density=0.5, h=1.0)
    assert {name: region.core.tolist() for name, region in found.items()} == {"a": [0, 1], "b": [0, 1]}


def test_random_rows_are_drawn_with_the_seed() -> None:
    layers = {"a": shares(1, 100), "b": shares(2, 100)}

    def drawn(seed: int) -> list[list[int]]:
        found = map_regions(layers, [], density=0.1, h=0.9, generator=torch.Generator().manual_seed(seed))
        return [region.core.tolist() for region in found.values()]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert [len(core) for core in drawn(1)] == [10, 10]
    best = map_regions(layers, [], density=0.1, h=0.9)["a"].core.tolist()
    assert drawn(1)[0] != best


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.sampled_from([0.2, 0.3, 0.55]))
def test_a_shared_budget_is_kept(seed: int, budget: float) -> None:
    used = torch.zeros(20, dtype=torch.bool)
    for task in range(6):
        own = shares(seed + task)
        core = map_regions(
            {"a": own}, [], density=0.2, h=0.9, used={"a": used}, budget=budget, exhausted="share"
        )["a"].core
        assert len(core) == len(core.unique()) == 4
        room = core_size(budget, 20) - int(used.sum())
        ranking = own.argsort(descending=True)
        natural = ranking[:4]
        if int((~used[natural]).sum()) <= room:
            assert core.tolist() == sorted(natural.tolist())
        else:
            assert int((~used[core]).sum()) == room
            # The best of the used ones fill the places that no new one may take.
            inside = [j for j in ranking.tolist() if used[j]]
            assert set(inside[: 4 - room]) <= set(core.tolist())
        used[core] = True
        assert int(used.sum()) <= core_size(budget, 20)


def test_an_exhausted_budget_names_layer_and_cure() -> None:
    used = torch.tensor([True, True, False, False])
    own = torch.tensor([0.1, 0.1, 0.3, 0.5])
    with pytest.raises(UserError) as caught:
        map_regions(
            {"layer.7": own}, [], density=0.5, h=0.9, used={"layer.7": used}, budget=0.75, task="news"
        )
    assert str(caught.value) == (
        "task 'news' needs 2 new neurons in 'layer.7', and plugins.parsp.budget = 0.75 leaves 1; raise it, lower "
        "plugins.parsp.density, or set plugins.parsp.exhausted: share"
    )
