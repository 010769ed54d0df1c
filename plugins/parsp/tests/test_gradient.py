"""Full weights under the same constraints (mode: gradient), and the capacity report."""

from __future__ import annotations

import pytest
import torch
from graftwork.testing.models import tiny_model
from graftwork_parsp import Basis, find_mlps, top_directions
from graftwork_parsp.capacity import capacities, charts
from graftwork_parsp.gradient import ProjectedRows
from graftwork_parsp.moments import Collected
from graftwork_parsp.neurons import Mlp
from graftwork_parsp.past import Past
from graftwork_parsp.regions import Region, entropy


def regions_of(mlps: list[Mlp], count: int = 7) -> dict[str, Region]:
    generator = torch.Generator().manual_seed(3)
    return {
        mlp.name: Region(
            torch.randperm(mlp.neurons, generator=generator)[:count].sort().values,
            torch.zeros(count, dtype=torch.bool),
            torch.zeros(mlp.neurons).double(),
        )
        for mlp in mlps
    }


def directions(mlps: list[Mlp], k: int) -> tuple[dict[str, Basis], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    spans = {mlp.name: torch.randn(k, mlp.inputs, generator=generator).double() for mlp in mlps}
    bases = {name: top_directions(x.T @ x, 0.0) for name, x in spans.items()}
    return bases, {name: torch.linalg.qr(x.T).Q for name, x in spans.items()}


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("k", [5, 20])
def test_both_constraints_hold_on_full_weights(kind: str, name: str, k: int, batch) -> None:
    model = tiny_model(kind)
    mlps = find_mlps(model)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    regions, (bases, spans) = regions_of(mlps), directions(mlps, k)
    rows = ProjectedRows(model, mlps, regions, bases)
    rows.freeze_others(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{key}.weight" for mlp in mlps for key in mlp.ins}
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    for _ in range(10):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        rows.before_step(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rows.after_step(model)
    for mlp in mlps:
        core = regions[mlp.name].core
        outside = torch.ones(mlp.neurons, dtype=torch.bool).index_fill(0, core, False)
        for key in mlp.ins:
            now, before = model.state_dict()[f"{key}.weight"], start[f"{key}.weight"]
            if kind == "gpt2":
                now, before = now.T, before.T
            assert torch.equal(now[outside], before[outside])
            change = now[core].double() - before[core].double()
            assert change.norm() > 1e-3
            # The weights are fp32 themselves, and what is added to them is rounded to their grid.
            grid = torch.finfo(torch.float32).eps * before[core].norm().item()
            assert (change @ spans[mlp.name]).norm() < 1e-6 * change.norm() + grid
    for key, value in model.state_dict().items():
        if key not in trained:
            assert torch.equal(value, start[key])


def test_without_a_past_it_is_masked_fine_tuning_bit_for_bit(batch) -> None:
    """SGD on the masked gradient, 5 steps."""
    model, reference = tiny_model(), tiny_model()
    mlps = find_mlps(model)
    regions = regions_of(mlps)
    rows = ProjectedRows(model, mlps, regions, {})
    rows.freeze_others(model)
    masks = {
        f"{key}.weight": torch.zeros(48, 1).index_fill(0, regions[mlp.name].core, 1.0)
        for mlp in mlps
        for key in mlp.ins
    }
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(name in masks)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        rows.before_step(model)
        optimizer.step()
        rows.after_step(model)
        own = reference(**batch).loss
        gradients = torch.autograd.grad(own, [reference.get_parameter(name) for name in masks])
        with torch.no_grad():
            for (name, mask), gradient in zip(masks.items(), gradients, strict=True):
                reference.get_parameter(name).add_(gradient * mask, alpha=-0.3)
        assert loss.item() == own.item()
    assert all(torch.equal(p, reference.get_parameter(n)) for n, p in model.named_parameters())
    assert not torch.equal(
        model.get_parameter(next(iter(masks))), tiny_model().get_parameter(next(iter(masks)))
    )


def test_before_the_step_gradients_lie_inside(batch) -> None:
    model = tiny_model()
    mlps = find_mlps(model)
    regions, (bases, spans) = regions_of(mlps), directions(mlps, 5)
    rows = ProjectedRows(model, mlps, regions, bases)
    model(**batch).loss.backward()
    plain = {mlp.ins[0]: model.get_parameter(f"{mlp.ins[0]}.weight").grad.double() for mlp in mlps}
    rows.before_step(model)
    for mlp in mlps:
        core, u = regions[mlp.name].core, spans[mlp.name]
        expected = torch.zeros(48, 32).double()
        expected[core] = plain[mlp.ins[0]][core] - plain[mlp.ins[0]][core] @ u @ u.T
        gradient = model.get_parameter(f"{mlp.ins[0]}.weight").grad
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-8)


# ---------------------------------------------------------------- capacity


def test_capacity_counts_neurons_and_directions() -> None:
    mlps = [
        Mlp("a", ("a.up",), "a.down", inputs=8, neurons=10),
        Mlp("b", ("b.up",), "b.down", inputs=8, neurons=10),
    ]
    past = Past(torch.zeros(32, dtype=torch.uint8))
    shares = [{"a": torch.rand(10), "b": torch.rand(10)} for _ in range(3)]
    past.record("calibration", shares[0], {}, Collected())
    past.taken.append({"a": 2, "b": 0})
    first = {"a": torch.tensor([0, 1]), "b": torch.tensor([5, 6])}
    past.record("one", shares[1], first, Collected())
    past.taken.append({"a": 4, "b": 3})
    second = {"a": torch.tensor([1, 9]), "b": torch.tensor([2, 3])}
    past.record("two", shares[2], second, Collected())
    past.taken.append({"a": 3, "b": 8})
    h = {name: entropy([share[name] for share in shares]) for name in ("a", "b")}
    regions = {name: Region(core, torch.tensor([True, False]), h[name]) for name, core in second.items()}
    a, b = capacities(mlps, past, regions)
    assert (a.layer, a.used, a.overlap, a.directions, a.free, a.generalist) == (
        "a",
        0.3,
        0.5,
        3 / 8,
        5 / 8,
        0.5,
    )
    assert (b.used, b.overlap, b.directions, b.free) == (0.4, 0.0, 1.0, 0.0)
    assert a.entropy == pytest.approx(h["a"][[1, 9]].mean().item())

    neurons, inputs = charts(mlps, past)
    assert (neurons.title, inputs.title) == ("neurons", "input directions")
    assert neurons.layers == inputs.layers == ["a", "b"]
    assert neurons.parts == {"one": [0.2, 0.2], "two": [0.1, 0.2]}
    # Where k fell, the highest so far stands.
    assert inputs.parts == {"calibration": [2 / 8, 0], "one": [2 / 8, 3 / 8], "two": [0, 5 / 8]}
    past.taken = [{} for _ in past.taken]
    assert [chart.title for chart in charts(mlps, past)] == ["neurons"]
