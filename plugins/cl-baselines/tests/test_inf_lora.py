"""InfLoRA: DualGPM and the choice of A against the paper's formulas by SVD in float64, whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graftwork import UserError, hookimpl
from graftwork.testing.data import tiny_stream
from graftwork.testing.models import tiny_checkpoint, tiny_model
from graftwork.testing.runs import run_tiny, tiny_recipe
from graftwork.train.statistics import attended
from graftwork_cl_baselines import inf_lora
from graftwork_cl_baselines.inf_lora import InfLora, InfLoraOptions
from graftwork_cl_baselines.subspace import Subspace
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

OPTIONS = {"rank": 2, "alpha": 4, "eps": 0.9}


def recipe_of(checkpoint: Path, stream: Path, options: dict | None = None, **changes: Any) -> Any:
    changes = {"train": {"max_steps": 3}, "evaluate": {"cells": "final"}, **changes}
    plugins = {"inf-lora": {**OPTIONS, **(options or {})}}
    return tiny_recipe(checkpoint, stream, plugins=plugins, seed=1, **changes)


def moment(width: int, seed: int, rank: int | None = None) -> torch.Tensor:
    """Return a second moment of data whose directions differ in size."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(3 * width, rank or width, dtype=torch.float64, generator=generator)
    mix = torch.randn(rank or width, width, dtype=torch.float64, generator=generator)
    data = data * torch.logspace(0, -2, rank or width, dtype=torch.float64) @ mix
    return data.T @ data / len(data)


def basis(width: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))[0][
        :, :columns
    ]


def projector(space: Subspace) -> torch.Tensor:
    """Return M M^T (d x d)."""
    inner = space.basis.double() @ space.basis.double().T
    return torch.eye(len(inner), dtype=torch.float64) - inner if space.complement else inner


def by_svd(m: torch.Tensor, h: torch.Tensor, eps: float) -> torch.Tensor:
    """Return DualGPM's new M from the formulas, by SVD: the smallest k that reaches the threshold."""
    residual = h - m @ m.T @ h
    u, s, _ = torch.linalg.svd(residual)
    total, left = h.square().sum(), residual.square().sum()
    for k in range(len(h) - m.shape[1] + 1):
        if (total - left + s[:k].square().sum()) / total >= eps - 1e-12:
            break
    return torch.cat([m, u[:, :k]], 1)


# ---------------------------------------------------------------------- the subspace


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 12), st.data(), st.integers(0, 2**31), st.floats(0.3, 0.999))
def test_the_subspace_grows_as_the_formulas_say(width: int, data: Any, seed: int, eps: float) -> None:
    columns = data.draw(st.integers(0, width - 1))
    h, m = moment(width, seed), basis(width, columns, seed + 1)
    expected = by_svd(m, h, eps)
    for space in (
        Subspace(m),
        Subspace(torch.linalg.qr(m, mode="complete")[0][:, columns:], complement=True)
        if columns
        else Subspace(torch.eye(width, dtype=torch.float64), complement=True),
    ):
        grown = space.extended(h, eps)
        assert grown.size == expected.shape[1]
        assert grown.complement == (space.complement or grown.size > width / 2)
        torch.testing.assert_close(projector(grown), expected @ expected.T, rtol=0, atol=2e-6)


def test_it_never_keeps_more_than_half_the_columns_and_never_shrinks() -> None:
    space, sizes = Subspace.empty(10), [0]
    for task in range(8):
        space = space.extended(moment(10, task, rank=3), 0.995)
        sizes.append(space.size)
        assert space.basis.shape[1] <= 5
        assert space.size + space.room == 10
        own = space.basis.double()
        torch.testing.assert_close(
            own.T @ own, torch.eye(own.shape[1], dtype=torch.float64), rtol=0, atol=1e-6
        )
    assert sizes == sorted(sizes)
    assert sizes[1] in (1, 2, 3)
    assert space.complement


def test_a_task_of_known_directions_adds_nothing() -> None:
    two = basis(8, 2, 0)
    h = two @ torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)) @ two.T
    space = Subspace.empty(8).extended(h, 1 - 1e-9)
    assert space.size == 2
    assert space.extended(3 * h, 0.999).size == 2
    assert space.extended(torch.zeros(8, 8), 0.999).size == 2


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 12), st.data(), st.integers(0, 2**31))
def test_a_is_the_top_of_the_free_inputs(width: int, data: Any, seed: int) -> None:
    columns = data.draw(st.integers(0, width - 2))
    h, m = moment(width, seed), basis(width, columns, seed + 1)
    a = Subspace(m).inputs(h, 2)
    u = torch.linalg.svd(h - m @ m.T @ h)[0][:, :2]
    torch.testing.assert_close(a @ a.T, torch.eye(2, dtype=torch.float64) / 3, rtol=0, atol=1e-9)
    torch.testing.assert_close(a @ m, torch.zeros(2, columns, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(3 * a.T @ a, u @ u.T, rtol=0, atol=1e-5)


def test_a_stays_free_where_the_task_has_fewer_directions_than_the_rank() -> None:
    """The left singular vectors of vanishing singular values are any: ours never lie in M."""
    m = basis(8, 3, 0)
    inside = m @ torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)) @ m.T
    a = Subspace(m).inputs(inside, 4)
    torch.testing.assert_close(a @ a.T, torch.eye(4, dtype=torch.float64) / 3, rtol=0, atol=1e-9)
    torch.testing.assert_close(a @ m, torch.zeros(4, 3, dtype=torch.float64), rtol=0, atol=1e-9)


def test_random_rows_are_made_free_and_rescaled() -> None:
    m, rows = basis(9, 4, 0), torch.randn(3, 9)
    made = Subspace(m).project_out(rows)
    expected = rows.double() - rows.double() @ m @ m.T
    expected = expected / expected.norm(dim=1, keepdim=True) / 3**0.5
    torch.testing.assert_close(made, expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize("init", ["data", "random"])
def test_a_run_resumes_to_the_same_bits_with_a_frozen(
    init: str, checkpoint: Path, stream: Path, resumes_exactly: Callable[..., Path]
) -> None:
    train = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = resumes_exactly(recipe_of(checkpoint, stream, {"init": init}, train=train), "inf-lora")
    state = load_file(whole / "stages/01-fruit/plugins/inf-lora.safetensors")
    spaces = {
        key.split(".", 2)[2]: Subspace(value, complement=key.startswith("free"))
        for key, value in state.items()
        if not key.startswith("taken")
    }
    new = load_file(whole / "stages/02-metal/model/task-metal/adapter_model.safetensors")
    checked = 0
    for key, a in new.items():
        if "lora_A" in key:
            # Rows of norm 1/sqrt 3 in the null space of the first task: it stayed as it was chosen.
            torch.testing.assert_close(a.norm(dim=1), torch.full((2,), 3**-0.5))
            if init == "data":
                torch.testing.assert_close(a @ a.T, torch.eye(2) / 3, rtol=0, atol=1e-6)
            if key.removesuffix(".lora_A.weight") in spaces:
                space = spaces[key.removesuffix(".lora_A.weight")]
                assert 0 < space.size < len(space.basis)
                assert (a.double() @ projector(space)).abs().max() < 1e-6
                checked += 1
    assert checked == len(spaces) == 2 * 4
    assert any(value.abs().sum() > 0 for key, value in new.items() if "lora_B" in key)


def test_what_is_trained_and_what_is_collected(
    checkpoint: Path, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A from the task's own moment by SVD; one moment for the layers that share an input; thresholds that rise."""
    seen: dict[str, Any] = {"thresholds": [], "trains": [], "inputs": {}}
    original = Subspace.extended

    def extended(self: Subspace, matrix: torch.Tensor, threshold: float) -> Subspace:
        seen["thresholds"].append(threshold)
        return original(self, matrix, threshold)

    class Spy(InfLora):
        @hookimpl
        def task_begin(self, run: Any, task: Any, trainer: Any) -> None:
            inputs: dict[str, list] = {}
            if task.index == 0:
                inputs = collect(trainer)
            super().task_begin(run, task, trainer)
            seen["trains"].append({n for n, p in trainer.model.named_parameters() if p.requires_grad})
            if task.index == 0:
                seen["groups"] = self.groups
                for first, members in self.groups.items():
                    rows = torch.cat(inputs[first]).double()
                    u = torch.linalg.svd(rows.T @ rows / len(rows))[0][:, :2]
                    for name in members:
                        layer = trainer.model.get_submodule(name)
                        a = layer.lora_A["task-fruit"].weight.detach().double()
                        torch.testing.assert_close(3 * a.T @ a, u @ u.T, rtol=0, atol=1e-3)

    def collect(trainer: Any) -> dict[str, list]:
        found: dict[str, list] = {}
        handles = []
        for name, module in trainer.model.named_modules():
            if hasattr(module, "lora_A"):

                def hook(_: Any, args: tuple, name: str = name) -> None:
                    found.setdefault(name, []).append(args[0][mask])

                handles.append(module.register_forward_pre_hook(hook))
        with torch.no_grad():
            for row in trainer.train_dataset:
                batch = trainer.data_collator([row])
                mask = attended(batch)
                trainer.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for handle in handles:
            handle.remove()
        return found

    monkeypatch.setattr(Subspace, "extended", extended)
    monkeypatch.setattr(inf_lora, "InfLora", Spy)
    result = run_tiny(recipe_of(checkpoint, stream), tmp_path / "run")
    layer = "base_model.model.model.layers.0"
    assert seen["groups"][f"{layer}.self_attn.q_proj"] == [f"{layer}.self_attn.{n}_proj" for n in "qkv"]
    assert seen["groups"][f"{layer}.mlp.gate_proj"] == [f"{layer}.mlp.{n}_proj" for n in ("gate", "up")]
    assert len(seen["groups"]) == 2 * 4
    for names, task in zip(seen["trains"], ("fruit", "metal"), strict=True):
        assert len(names) == 14
        assert all(f"lora_B.task-{task}" in name for name in names)
    assert seen["thresholds"] == [pytest.approx(0.9)] * 8 + [pytest.approx(0.9 + 0.1 * 1 / 2)] * 8
    (chart,) = result["charts"]
    assert list(chart["parts"]) == ["fruit", "metal"]
    assert chart["layers"] == list(seen["groups"])
    shares = torch.tensor([chart["parts"][task] for task in ("fruit", "metal")])
    assert (shares[0] > 0).all()
    assert (shares.sum(0) <= 1).all()


@pytest.mark.parametrize("kind", ["gpt2"])
def test_other_architectures(kind: str, stream: Path, tmp_path: Path) -> None:
    """GPT-2's layers are no Linear, and its attention takes one matrix for queries, keys and values."""
    run_tiny(recipe_of(tiny_checkpoint(tmp_path / "model", kind), stream), tmp_path / "run")
    new = load_file(tmp_path / "run/stages/02-metal/model/task-metal/adapter_model.safetensors")
    norms = [a.norm(dim=1) for key, a in new.items() if "lora_A" in key]
    assert norms
    assert all(torch.allclose(norm, torch.full((2,), 3**-0.5)) for norm in norms)


def test_old_outputs_hardly_change(checkpoint: Path, tmp_path: Path) -> None:
    """The new update times old inputs, per layer, is small against a stack's that ignores them."""
    stream = tiny_stream(tmp_path / "stream", ["fruit", "metal"], train=16, test=2)
    effects = []
    for name, options in (("inf", {"eps": 0.99999}), ("free", {"eps": 1e-6})):
        folder = tmp_path / name
        run_tiny(recipe_of(checkpoint, stream, {**options, "init": "random"}), folder)
        state = load_file(tmp_path / "inf/stages/01-fruit/plugins/inf-lora.safetensors")
        new = load_file(folder / "stages/02-metal/model/task-metal/adapter_model.safetensors")
        total = 0.0
        for key, value in state.items():
            part, _, layer = key.split(".", 2)
            if part != "taken":
                update = new[f"{layer}.lora_B.weight"] @ new[f"{layer}.lora_A.weight"]
                total += (update.double() @ projector(Subspace(value, part == "free"))).norm().item()
        effects.append(total)
    assert effects[0] < 1e-4 * effects[1]


# ---------------------------------------------------------------------- refusals


def test_no_room_left_is_told(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"use \d+ of the 32 input directions of layer '.*q_proj'") as caught:
        run_tiny(recipe_of(checkpoint, stream, {"rank": 32}), tmp_path / "run")
    assert "lower plugins.inf-lora.eps or plugins.inf-lora.rank" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rank_above_a_layers_width_is_refused_before_anything_is_read() -> None:
    plugin = InfLora(InfLoraOptions(rank=33))
    with pytest.raises(UserError, match="rank 33 is more than the 32 input directions") as caught:
        plugin.adapter_config(SimpleNamespace(), tiny_model())
    assert "\n" not in str(caught.value)
    assert (
        InfLora(InfLoraOptions(rank=32)).adapter_config(SimpleNamespace(), tiny_model()).policy == "stacked"
    )


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"eps": 0}, {"eps": 1.5}, {"init": "zero"}, {"moment_items": 0}, {"lambda_orth": 1}],
)
def test_bad_options_are_refused(options: dict, checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=next(iter(options))) as caught:
        run_tiny(recipe_of(checkpoint, stream, options), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
