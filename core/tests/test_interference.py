"""Cosines between the updates of tasks: the sketch against exact inner products, layers, whole runs."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.testing.models import tiny_model
from graftwork.testing.runs import run_tiny, tiny_recipe
from graftwork.train.interference import FILE, SIDE, Updates, cosines, fold, snapshot, variance
from peft import IA3Config, LoraConfig, OFTConfig, PrefixTuningConfig, get_peft_model
from torch import nn

LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
QUICK = {"cells": "final"}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() * b.double()).sum())


# ---------------------------------------------------------------- the sketch


def test_a_sketch_is_linear() -> None:
    a, b = random(150, 99), random(150, 99, seed=1)
    torch.testing.assert_close(fold(2 * a - 3 * b, "x"), 2 * fold(a, "x") - 3 * fold(b, "x"))


def test_a_sketch_sums_every_signed_entry_once() -> None:
    """The entries of the sketch of a unit matrix are one +1 or -1; over all rows, every bucket is used alike."""
    images = [fold(torch.eye(130)[:, row : row + 1], "x") for row in range(130)]
    assert all(image.abs().sum() == 1 for image in images)
    assert sorted(torch.cat(images, 1).abs().sum(1).tolist()) == [2.0] * (SIDE - 2) + [3.0] * 2


def test_a_small_side_stays_as_it_is() -> None:
    a, b = random(SIDE, 10), random(SIDE, 10, seed=1)
    assert torch.equal(fold(a, "x"), a)
    assert variance(fold(a, "x")[:10]) == 0
    assert dot(fold(a, "x"), fold(b, "x")) == dot(a, b)


@pytest.mark.parametrize("rank", [1, 4, None])
@pytest.mark.parametrize("shared", [False, True])
def test_inner_products_are_unbiased_and_within_the_stated_variance(rank: int | None, shared: bool) -> None:
    """``shared``: the column spaces coincide, the worst case but for equal matrices."""
    if rank is None:
        a, b = random(300, 200), random(300, 200, seed=1)
        b = b + 0.5 * a if shared else b
    else:
        left = random(300, rank)
        a = left @ random(rank, 200, seed=1)
        b = (left if shared else random(300, rank, seed=2)) @ random(rank, 200, seed=3)
    scale = float(a.norm() * b.norm())
    estimates = [dot(fold(a, f"{n}"), fold(b, f"{n}")) / scale for n in range(400)]
    errors = torch.tensor(estimates) - dot(a, b) / scale
    bound = math.sqrt(variance(fold(a, "0")))
    assert bound == pytest.approx(0.25, abs=0.01)
    assert errors.mean().abs() < 4 * errors.std() / math.sqrt(len(errors))
    assert errors.square().mean().sqrt() < bound


def test_the_stated_variance_is_nearly_reached_by_equal_matrices_of_rank_one() -> None:
    a = random(300, 1) @ random(1, 200, seed=1)
    errors = torch.tensor([dot(fold(a, f"{n}"), fold(a, f"{n}")) / dot(a, a) - 1 for n in range(400)])
    assert 0.7 < errors.std() / math.sqrt(variance(fold(a, "0"))) < 1.1


# ---------------------------------------------------------------- cosines


def test_cosines_of_known_updates() -> None:
    """Equal: 1; opposite: -1; orthogonal: near 0; nothing changed: None."""
    a = random(300, 200)
    orthogonal = random(300, 200, seed=1)
    orthogonal -= a * (dot(a, orthogonal) / dot(a, a))
    layers = {
        f"layer{n}": [a.roll(n, 0), 2 * a.roll(n, 0), -a.roll(n, 0), orthogonal.roll(n, 0)] for n in range(8)
    }
    updates = [{name: fold(many[k], name) for name, many in layers.items()} for k in range(4)]
    matrix, error = cosines([*updates, {}])
    assert error == pytest.approx(0.25 / math.sqrt(8), rel=0.02)
    near, far = pytest.approx(1, abs=1e-6), pytest.approx(-1, abs=1e-6)
    zero = pytest.approx(0, abs=3 * error)
    none = [None] * 5
    assert matrix == [
        [1, near, far, zero, None],
        [near, 1, far, zero, None],
        [far, far, 1, zero, None],
        [zero, zero, zero, 1, None],
        none,
    ]
    assert cosines([{}, {}]) == ([[None, None], [None, None]], None)


def test_layers_that_only_one_task_changed_count_for_its_norm() -> None:
    one, two = torch.tensor([[3.0]]), torch.tensor([[4.0]])
    matrix, error = cosines([{"a": one, "b": two}, {"a": one}])
    assert matrix[0][1] == matrix[1][0] == pytest.approx(3 / 5)
    assert error == 0


# ---------------------------------------------------------------- models


def wide_model(**settings: Any) -> nn.Module:
    """A model wide enough for its layers to be folded."""
    return tiny_model(hidden_size=96, intermediate_size=160, **settings)


def train(model: nn.Module, seed: int) -> None:
    """Move everything that trains a little."""
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.1 * random(*parameter.shape, seed=1000 * seed + number)


def dense_cosines(updates: list[list[torch.Tensor]]) -> list[list[float]]:
    flat = [torch.cat([layer.double().flatten() for layer in update]) for update in updates]
    return [[float(a @ b / a.norm() / b.norm()) for b in flat] for a in flat]


def follow(model: nn.Module, change: Any, tasks: int, folder: Path) -> dict[str, Any]:
    """Return the result after ``change(task)`` was made to the model for every task."""
    updates = Updates(True)
    stages = []
    for task in range(tasks):
        updates.begin(model)
        change(task)
        updates.end(model)
        stages.append(folder / str(task))
        stages[-1].mkdir(parents=True)
        updates.save(stages[-1])
    assert updates.notes() == []
    return updates.result(stages)


def assert_close(result: dict[str, Any], exact: list[list[float]]) -> None:
    error = result["interference_error"]
    assert 0 < error < 0.25
    assert torch.tensor(result["interference"]).sub(torch.tensor(exact)).abs().max() < 3 * error


def test_lora_against_dense_updates(tmp_path: Path) -> None:
    model = get_peft_model(wide_model(), LoraConfig(r=4, target_modules="all-linear"))
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight")]
    totals = [[layer.get_delta_weight("default").detach().double() for layer in layers]]

    def change(task: int) -> None:
        train(model, 0)  # in part the same noise for every task: their updates are related
        train(model, 1 + task)
        totals.append([layer.get_delta_weight("default").detach().double() for layer in layers])

    result = follow(model, change, 3, tmp_path)
    exact = dense_cosines([[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(totals)])
    assert abs(exact[2][1]) > 0.2  # something to see
    assert_close(result, exact)


def test_stacked_adapters_sum(tmp_path: Path) -> None:
    """The update of a task is its own adapter's delta, however many are active."""
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(wide_model(), config, adapter_name="t0")
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight")]

    def change(task: int) -> None:
        if task:
            model.add_adapter(f"t{task}", config)
        model.base_model.set_adapter([f"t{n}" for n in range(task + 1)])
        for n in range(task):
            model.set_requires_grad(f"t{n}", False)
        train(model, 0)  # the same noise for every task: their updates are related

    result = follow(model, change, 3, tmp_path)
    deltas = [[layer.get_delta_weight(f"t{n}").detach() for layer in layers] for n in range(3)]
    assert_close(result, dense_cosines(deltas))


def test_weights_themselves_where_all_train(tmp_path: Path) -> None:
    model = wide_model()
    states = [{name: p.detach().clone() for name, p in model.named_parameters() if p.ndim > 1}]

    def change(task: int) -> None:
        train(model, task // 2)
        states.append({name: p.detach().clone() for name, p in model.named_parameters() if p.ndim > 1})

    result = follow(model, change, 4, tmp_path)
    exact = dense_cosines(
        [[new[name].double() - old[name].double() for name in old] for old, new in pairwise(states)]
    )
    assert exact[0][1] == pytest.approx(1, abs=1e-4)
    assert_close(result, exact)


def test_a_delta_that_is_merged_into_the_base_stays_in_the_update(tmp_path: Path) -> None:
    """Folding what was learned into the weights changes nothing that the model computes, and is no update."""
    model = get_peft_model(wide_model(), LoraConfig(r=4, target_modules="all-linear"))
    train(model, 0)
    before = snapshot(model)
    model.merge_adapter()
    after = snapshot(model)
    for name, sketch in before.items():
        torch.testing.assert_close(after[name], sketch, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_a_layer_lacks_does_not_count() -> None:
    model = get_peft_model(wide_model(), LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.base_model.set_adapter(["one", "two"])
    assert {name.rpartition(".")[2] for name in snapshot(model)} == {"q_proj", "v_proj"}


class Gated(nn.Module):
    """Stands for weights that another process holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "does not only add to its weight"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "does not tell what it adds"),
        (OFTConfig(oft_block_size=8, target_modules=["q_proj"]), "type OFT do not add"),
        (
            PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "type PREFIX_TUNING do not add to the weights of layers",
        ),
        (None, "spread over several processes"),
    ],
)
def test_what_has_no_fixed_update_says_why_once(config: Any, words: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), config) if config else Gated()
    updates = Updates(True)
    for _ in range(2):
        updates.begin(model)
        updates.end(model)
        updates.save(tmp_path)
    (note,) = updates.notes()
    assert words in note
    assert updates.result([tmp_path, tmp_path]) == {"interference": [], "interference_error": None}
    assert list(tmp_path.iterdir()) == []


def test_an_update_that_depends_on_the_input_has_no_figure() -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj

    def refuse(adapter: str) -> torch.Tensor:
        raise ValueError("the gates depend\non the input")

    layer.get_delta_weight = refuse
    updates = Updates(True)
    updates.begin(model)
    assert "q_proj' has no fixed update (the gates depend on the input)" in updates.notes()[0]


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("policy", ["shared", "stacked", "separate", None])
def test_a_run_has_the_cosines_of_its_saved_weights(
    policy: str | None, checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    """All layers of the tiny model are narrower than a sketch, so the cosines are exact."""
    from peft import PeftModel
    from safetensors.torch import load_file

    adapter = {**LORA, "policy": policy} if policy else None
    result = run_tiny(tiny_recipe(checkpoint, stream, adapter=adapter, evaluate=QUICK), tmp_path / "run")
    matrix = result["interference"]
    assert [len(row) for row in matrix] == [3, 3, 3]
    assert [matrix[k][k] for k in range(3)] == [1, 1, 1]
    stages = sorted((tmp_path / "run/stages").iterdir())
    assert all((stage / FILE).stat().st_size > 1000 for stage in stages)
    if policy is None:
        start, end = (
            load_file(tmp_path / "run/model/model.safetensors"),
            load_file(checkpoint / "model.safetensors"),
        )
        total = {key: (start[key] - end[key]).double() for key in start if start[key].ndim > 1}
        updates = [load_file(stage / FILE) for stage in stages]
        for name, change in total.items():
            if max(change.shape) <= SIDE:
                summed = sum(update[name].double() for update in updates)
                torch.testing.assert_close(summed, change, rtol=1e-4, atol=1e-6)
        return
    deltas = []
    for stage in stages:
        task = stage.name.partition("-")[2]
        folder = stage / "model" if policy == "shared" else stage / "model" / f"task-{task}"
        model = PeftModel.from_pretrained(tiny_model(), folder)
        layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight")]
        deltas.append([layer.get_delta_weight("default").detach().double() for layer in layers])
    if policy == "shared":
        before = [[torch.zeros_like(layer) for layer in deltas[0]], *deltas]
        deltas = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(before)]
    torch.testing.assert_close(torch.tensor(matrix), torch.tensor(dense_cosines(deltas)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("policy", ["shared", "stacked"])
def test_resuming_loses_nothing(policy: str, checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    """Cut back into the second task, at a checkpoint of it: sketches and cosines are the same bits."""
    recipe = tiny_recipe(
        checkpoint,
        stream,
        adapter={**LORA, "policy": policy},
        train={"save_strategy": "steps", "save_steps": 2, "max_steps": 5},
        evaluate=QUICK,
    )
    whole = run_tiny(recipe, tmp_path / "a")
    with pytest.MonkeyPatch.context() as patch:
        from graftwork.train.stream import Stream

        original = Stream._write_stage

        def stop(self: Any, task: Any) -> None:
            if task.index == 1:
                raise KeyboardInterrupt
            original(self, task)

        patch.setattr(Stream, "_write_stage", stop)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(recipe, tmp_path / "b")
    assert (tmp_path / "b/stages/current/checkpoint-4").exists()
    again = run_tiny(recipe, tmp_path / "b", resume=True)
    assert again["interference"] == whole["interference"]
    assert again["interference_error"] == whole["interference_error"]
    for file in sorted((tmp_path / "a/stages").rglob(FILE)):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


def test_the_reason_survives_a_resumed_run(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    dora = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "use_dora": True}
    recipe = tiny_recipe(checkpoint, stream, adapter=dora, train={"max_steps": 1}, evaluate=QUICK)
    whole = run_tiny(recipe, tmp_path / "run")
    assert whole["interference"] == []
    assert sum("cosines between the updates" in note for note in whole["notes"]) == 1
    (tmp_path / "run/result.json").unlink()
    assert run_tiny(recipe, tmp_path / "run", resume=True)["notes"] == whole["notes"]


def test_it_can_be_turned_off(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        checkpoint, stream, adapter=LORA, train={"max_steps": 1}, evaluate={**QUICK, "interference": False}
    )
    result = run_tiny(recipe, tmp_path / "run")
    assert result["interference"] == []
    assert result["notes"] == []
    assert not list((tmp_path / "run").rglob(FILE))


# ---------------------------------------------------------------- what else a run costs


def test_costs_are_in_the_result_and_survive_a_resumed_run(
    checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    """Adapters of every task kept: their size is that of the files, and grows with the tasks."""
    recipe = tiny_recipe(
        checkpoint, stream, adapter={**LORA, "policy": "stacked"}, train={"max_steps": 1}, evaluate=QUICK
    )
    whole = run_tiny(recipe, tmp_path / "run")
    stages = sorted((tmp_path / "run/stages").iterdir())
    sizes = [sum(p.stat().st_size for p in (stage / "model").rglob("*.safetensors")) for stage in stages]
    records = [json.loads((stage / "stage.json").read_text()) for stage in stages]
    assert [record["adapter_bytes"] for record in records] == sizes
    assert sizes[2] == 3 * sizes[0] == whole["adapter_bytes"]
    assert whole["statistics_seconds"] == pytest.approx(records[2]["statistics_seconds"], abs=1e-3)
    (tmp_path / "run/result.json").unlink()
    again = run_tiny(recipe, tmp_path / "run", resume=True)
    assert [again[key] for key in ("adapter_bytes", "statistics_seconds")] == [
        whole[key] for key in ("adapter_bytes", "statistics_seconds")
    ]
    shutil.rmtree(tmp_path / "run")
    full = run_tiny(tiny_recipe(checkpoint, stream, train={"max_steps": 1}, evaluate=QUICK), tmp_path / "run")
    assert full["adapter_bytes"] == 0


SLOW_STATISTICS = """
import time
from graftwork import hookimpl

class Plugin:
    def __init__(self, options):
        pass

    @hookimpl
    def task_begin(self, run, task, trainer):
        time.sleep(0.2)

    @hookimpl
    def task_end(self, run, task, trainer):
        time.sleep(0.1)
"""


def test_time_around_a_task_is_counted_once(
    checkpoint: Path, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tasks of 0.3 s; the pass that a resumed task repeats is not counted a second time."""
    import importlib

    from graftwork.testing.packages import install_plugin
    from graftwork.train.stream import Stream

    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install_plugin(tmp_path / "site", "slow", "slow_statistics:Plugin", SLOW_STATISTICS)
    importlib.invalidate_caches()
    recipe = tiny_recipe(
        checkpoint,
        stream,
        adapter=LORA,
        plugins={"slow": {}},
        train={"save_strategy": "steps", "save_steps": 1, "max_steps": 2},
        evaluate=QUICK,
    )
    original = Stream._write_stage

    def stop(self: Any, task: Any) -> None:
        if task.index == 1:
            raise KeyboardInterrupt
        original(self, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "_write_stage", stop)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(recipe, tmp_path / "run")
    result = run_tiny(recipe, tmp_path / "run", resume=True)
    assert result["statistics_seconds"] == pytest.approx(0.9, abs=0.09)
