"""EWC: importance against per-item gradients, the penalty against the plain sum, whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.testing.models import tiny_model
from graftwork.testing.runs import losses, run_tiny, tiny_recipe
from graftwork_cl_baselines.ewc import Ewc, EwcOptions
from graftwork_cl_baselines.quadratic import Quadratic, fisher, trained_parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F

LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
ADAPTERS = {"lora": LORA, "full": None}


def recipe_of(checkpoint: Path, stream: Path, options: dict | None = None, **changes: Any) -> Any:
    changes = {"train": {"max_steps": 3}, "evaluate": {"cells": "final"}, "adapter": LORA, **changes}
    return tiny_recipe(checkpoint, stream, plugins={"ewc": options or {}}, seed=1, **changes)


def items(count: int = 4, length: int = 9) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for number in range(count):
        ids = torch.randint(3, 200, (1, length), generator=generator)
        labels = ids.clone()
        labels[:, : 4 + number % 3] = -100
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


# ---------------------------------------------------------------------- importance


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_one_item_at_a_time_and_vmap_agree(kind: str, stacked: Callable[..., PeftModel]) -> None:
    """torch.func's per-item gradients of the summed answer log-probability, squared and averaged."""
    model = stacked(1, moved=True) if kind == "lora" else tiny_model()
    model.double().eval()
    batches = items()
    parameters = {name: value.detach() for name, value in trained_parameters(model).items()}

    def log_probability(values: dict, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        ids, labels = ids[None], labels[None]
        # Without the mask of ones, since transformers looks at its values, which vmap forbids.
        logits = torch.func.functional_call(model, values, (), {"input_ids": ids, "use_cache": False}).logits
        return -F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum", ignore_index=-100)

    ids = torch.cat([batch["input_ids"] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    gradients = torch.func.vmap(torch.func.grad(log_probability), in_dims=(None, 0, 0))(
        parameters, ids, labels
    )
    found = fisher(model, batches)
    assert found.keys() == gradients.keys() == parameters.keys()
    for name, value in found.items():
        assert value.dtype == torch.float64
        expected = gradients[name].square().mean(0)
        # Losses are taken from fp32 logits.
        torch.testing.assert_close(
            value.double(), expected, rtol=1e-4, atol=1e-4 * expected.max().item() + 1e-12
        )
    assert sum(value.sum().item() for value in found.values()) > 0


def test_importance_of_one_weight_by_hand() -> None:
    """A finite difference of every item's log-probability, squared, averaged."""
    model = tiny_model(dtype=torch.float32).eval()
    batches = items()
    found = fisher(model, batches)
    weight = dict(model.named_parameters())["model.layers.1.mlp.down_proj.weight"]
    place = divmod(int(found["model.layers.1.mlp.down_proj.weight"].argmax()), weight.shape[1])
    step, slopes = 1e-2, []
    for batch in batches:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * step
                logits = model(batch["input_ids"]).logits[0, :-1].double()
                weight[place] -= sign * step
            chosen = batch["labels"][0, 1:]
            kept = chosen != -100
            values.append(torch.log_softmax(logits, -1)[kept].gather(1, chosen[kept, None]).sum())
        slopes.append((values[0] - values[1]).item() / (2 * step))
    expected = sum(slope**2 for slope in slopes) / len(slopes)
    assert found["model.layers.1.mlp.down_proj.weight"][place].item() == pytest.approx(expected, rel=2e-3)


def test_a_batch_of_items_is_something_else_and_nothing_is_left_behind() -> None:
    model = tiny_model().train()
    batches = items(2)
    joint = [{key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}]
    one, both = fisher(model, batches), fisher(model, joint)
    assert not torch.allclose(one["lm_head.weight"], both["lm_head.weight"], rtol=0.05)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


# ---------------------------------------------------------------------- the penalty


def pasts(count: int, seed: int, size: int = 5) -> tuple[list, list, dict]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: {  # noqa: E731
        name: torch.randn(size, dtype=torch.float64, generator=generator) for name in ("a", "b")
    }
    weights = [{name: value.abs() for name, value in draw().items()} for _ in range(count)]
    for number, weight in enumerate(weights):
        weight["a"][number % size] = 0  # an entry that a task does not depend on
    return weights, [draw() for _ in range(count)], draw()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**31))
def test_one_square_and_a_constant_are_the_sum_over_all_tasks(count: int, seed: int) -> None:
    weights, points, now = pasts(count, seed)
    naive = 0.5 * sum(
        (weight[name] * (now[name] - point[name]) ** 2).sum()
        for weight, point in zip(weights, points, strict=True)
        for name in now
    )
    past = Quadratic()
    for weight, point in zip(weights, points, strict=True):
        past.add(weight, point)
    again = Quadratic.from_state(past.state())
    for name in now:
        now[name].requires_grad_()
    slope = torch.autograd.grad(past.penalty(now), list(now.values()))
    expected = [
        sum(weight[name] * (now[name] - point[name]) for weight, point in zip(weights, points, strict=True))
        for name in now
    ]
    # The constant is added in fp32, as a logged number; the gradient does not see it.
    assert past.penalty(now).item() == pytest.approx(naive.item(), rel=1e-6)
    assert again.penalty(now).item() == past.penalty(now).item()
    for mine, theirs in zip(slope, expected, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-10, atol=1e-10)
    assert len(past.state()) == 2 * 2 + 1


def test_an_entry_that_no_task_depends_on_is_free() -> None:
    past, zero = Quadratic(), torch.zeros(2)
    past.add({"w": zero}, {"w": torch.ones(2)})
    past.add({"w": zero}, {"w": -torch.ones(2)})
    assert past.penalty({"w": torch.full((2,), 9.0)}).item() == 0


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.integers(0, 2**31))
def test_online_importance_decays_around_the_newest_point(gamma: float, seed: int) -> None:
    weights, points, now = pasts(3, seed)
    past = Quadratic()
    for weight, point in zip(weights, points, strict=True):
        past.replace(weight, point, gamma)
        assert past.penalty(point).item() == 0
    expected = sum(
        (
            (gamma**2 * weights[0][name] + gamma * weights[1][name] + weights[2][name])
            * (now[name] - points[2][name]) ** 2
        ).sum()
        for name in now
    )
    assert past.penalty(now).item() == pytest.approx(0.5 * expected.item(), rel=1e-6)


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize(("kind", "mode"), [("lora", "separate"), ("full", "online")])
def test_a_run_is_penalised_and_resumes_to_the_same_bits(
    kind: str,
    mode: str,
    checkpoint: Path,
    stream: Path,
    resumes_with_term: Callable[..., Path],
) -> None:
    train = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    recipe = recipe_of(checkpoint, stream, {"mode": mode}, train=train, adapter=ADAPTERS[kind])
    whole = resumes_with_term(recipe, "ewc", "ewc")
    first, second = (
        load_file(whole / f"stages/{name}/plugins/ewc.safetensors") for name in ("01-fruit", "02-metal")
    )
    # As many bytes after two tasks as after one.
    assert {key: value.shape for key, value in first.items()} == {
        key: value.shape for key, value in second.items()
    }
    assert all(value.min() >= 0 for key, value in second.items() if key.startswith("weight"))
    assert (second["rest"] > 0) == (mode == "separate")


def test_the_first_task_knows_nothing_of_it_and_strength_0_is_sequential_lora(
    checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    for name, options in (("on", {}), ("off", {"strength": 0})):
        run_tiny(recipe_of(checkpoint, stream, options), tmp_path / name)
    plain = tiny_recipe(
        checkpoint, stream, seed=1, adapter=LORA, train={"max_steps": 3}, evaluate={"cells": "final"}
    )
    run_tiny(plain, tmp_path / "plain")
    on, off, without = (losses(tmp_path / name) for name in ("on", "off", "plain"))
    assert off == without
    assert on[:4] == without[:4]
    assert on[4:] != without[4:]


def test_a_stronger_pull_moves_less(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    """Distance of the second task's weights from the first's, where the first depends on them."""
    moved = []
    for strength in (1e-3, 1e6):
        folder = tmp_path / f"s{strength}"
        train = {"max_steps": 8, "learning_rate": 1e-3, "max_grad_norm": 0}
        run_tiny(recipe_of(checkpoint, stream, {"strength": strength}, train=train), folder)
        state = load_file(folder / "stages/01-fruit/plugins/ewc.safetensors")
        first, second = (
            load_file(folder / f"stages/{name}/model/adapter_model.safetensors")
            for name in ("01-fruit", "02-metal")
        )
        moved.append(
            sum(
                (state[f"weight.{key.replace('.weight', '.default.weight')}"] * (second[key] - value) ** 2)
                .sum()
                .item()
                for key, value in first.items()
            )
        )
    assert moved[1] < 0.5 * moved[0]


def test_how_many_items_count(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    states = []
    for options in ({}, {"fisher_items": 16}, {"fisher_items": 5}):
        folder = tmp_path / str(len(states))
        run_tiny(recipe_of(checkpoint, stream, options, train={"max_steps": 1}), folder)
        states.append(load_file(folder / "stages/01-fruit/plugins/ewc.safetensors"))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0] if "weight." in key)


# ---------------------------------------------------------------------- refusals


def test_a_past_that_no_longer_trains_is_told(stacked: Callable[..., PeftModel]) -> None:
    plugin = Ewc(EwcOptions())
    plugin.past.add({"gone": torch.ones(1)}, {"gone": torch.ones(1)})
    with pytest.raises(UserError, match="none of the parameters of earlier tasks") as caught:
        plugin.loss_terms(SimpleNamespace(), stacked(1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": {**LORA, "policy": "stacked"}}, "adapter.policy: shared"),
        ({"train": {"packing": True}}, "train.packing"),
        ({"train": {"deepspeed": {"zero_optimization": {"stage": 3}}}}, "stage 3 of DeepSpeed"),
        ({"train": {"fsdp": True}}, "train.fsdp"),
    ],
)
def test_what_cannot_work_is_refused(
    changes: dict, said: str, checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        run_tiny(recipe_of(checkpoint, stream, **changes), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options", [{"strength": -1}, {"mode": "both"}, {"gamma": 1.5}, {"fisher_items": 0}, {"lambda": 1}]
)
def test_bad_options_are_refused(options: dict, checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=next(iter(options))) as caught:
        run_tiny(recipe_of(checkpoint, stream, options), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
