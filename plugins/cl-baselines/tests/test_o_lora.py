"""O-LoRA: the penalty in float64, the stack of adapters, the exported sum."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.testing.models import tiny_model
from graftwork.testing.runs import losses, run_tiny, tiny_recipe
from graftwork_cl_baselines.o_lora import OLora, OLoraOptions, norm, norms, orthogonality
from graftwork_cl_baselines.stacked import Factors, factors
from peft import PeftModel
from safetensors.torch import load_file

OPTIONS = {"rank": 2, "alpha": 4}


def recipe_of(checkpoint: Path, stream: Path, options: dict | None = None, **settings: Any) -> Any:
    settings = {"train": {"max_steps": 3}, "evaluate": {"cells": "final"}, **settings}
    plugins = {"o-lora": {**OPTIONS, **(options or {})}}
    return tiny_recipe(checkpoint, stream, plugins=plugins, seed=1, **settings)


def matrices(model: PeftModel) -> list[tuple[list, list]]:
    """Return (rows of all older A, rows of the newest A) per layer as lists of floats."""
    found = []
    for module in model.modules():
        if hasattr(module, "lora_A"):
            weights = [layer.weight.detach().double().tolist() for layer in module.lora_A.values()]
            found.append(([row for weight in weights[:-1] for row in weight], weights[-1]))
    return found


def test_the_penalty_by_hand(stacked: Callable[..., PeftModel]) -> None:
    model = stacked()
    total, count = 0.0, 0
    for old, new in matrices(model):
        for a in old:
            for b in new:
                total += abs(math.fsum(x * y for x, y in zip(a, b, strict=True)))
                count += 1
    assert count == 4 * (4 * 2)
    pairs = factors(model)
    assert orthogonality(pairs, "sum").item() == pytest.approx(total, rel=1e-5)
    assert orthogonality(pairs, "mean").item() == pytest.approx(total / count, rel=1e-5)
    assert OLora(OLoraOptions(**OPTIONS)).options.form == "sum"


@pytest.mark.parametrize("form", ["sum", "mean"])
def test_only_the_new_adapter_gets_a_gradient(form: str, stacked: Callable[..., PeftModel]) -> None:
    model = stacked()
    orthogonality(factors(model), form).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(moved) == 4
    assert all("lora_A.t2" in name for name in moved)
    with torch.no_grad():
        scale = 1 if form == "sum" else 1 / 32
        layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
        old = torch.cat([layer.lora_A[name].weight for name in ("t0", "t1")]).double()
        new = layer.lora_A["t2"].weight
        expected = scale * (torch.sign(old @ new.double().T).T @ old)
        torch.testing.assert_close(new.grad.double(), expected, rtol=1e-5, atol=1e-7)


def test_orthogonal_rows_cost_nothing() -> None:
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0].float()
    pairs = [Factors([basis[:2], basis[2:4]], basis[4:6], torch.zeros(8, 2))]
    assert orthogonality(pairs).item() == pytest.approx(0, abs=1e-5)
    assert orthogonality([Factors([basis[:2]], 3 * basis[:2], torch.zeros(8, 2))]).item() == pytest.approx(
        6, rel=1e-5
    )


def test_norms_by_hand_with_a_finite_gradient_where_b_is_zero(stacked: Callable[..., PeftModel]) -> None:
    model = stacked()
    pairs = factors(model)
    expected = math.fsum(
        math.sqrt(math.fsum(x * x for row in new for x in row)) for _, new in matrices(model)
    )
    value = norms(pairs)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    for _, a, b in pairs:
        torch.testing.assert_close(a.grad, a.detach() / a.detach().norm())
        assert torch.equal(b.grad, torch.zeros_like(b))
    matrix = torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16)
    assert norm(matrix).item() == 5


def test_which_terms_there_are(stacked: Callable[..., PeftModel]) -> None:
    first, later = stacked(1), stacked(2)

    def names(model: torch.nn.Module, **options: Any) -> list[tuple[str, float, str]]:
        terms = OLora(OLoraOptions(**OPTIONS, **options)).loss_terms(None, model)
        return [(term.name, term.weight, term.per) for term in terms]

    assert names(first) == []
    assert names(first, lambda_norm=0.1) == [("norm", 0.1, "step")]
    assert names(later) == [("orth", 0.5, "step")]
    assert names(later, lambda_orth=0) == []
    assert names(later, lambda_norm=0.1, lambda_orth=2) == [("orth", 2, "step"), ("norm", 0.1, "step")]
    term = OLora(OLoraOptions(**OPTIONS, form="mean")).loss_terms(None, later)[0]
    assert term.fn(later, {}).item() == pytest.approx(orthogonality(factors(later), "mean").item())


def test_a_stream_that_did_not_stack_is_told_so(stacked: Callable[..., PeftModel]) -> None:
    plugin = OLora(OLoraOptions(**OPTIONS))
    trainer = SimpleNamespace(model=stacked(1))
    plugin.task_end(None, SimpleNamespace(index=0), trainer)
    with pytest.raises(UserError, match="found no earlier adapter to be orthogonal to") as caught:
        plugin.task_end(None, SimpleNamespace(index=1), trainer)
    assert "\n" not in str(caught.value)
    plugin.task_end(None, SimpleNamespace(index=1), SimpleNamespace(model=stacked(2)))
    OLora(OLoraOptions(**OPTIONS, lambda_orth=0)).task_end(None, SimpleNamespace(index=1), trainer)


@pytest.fixture(scope="module")
def finished(checkpoint: Path, stream: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two tasks."""
    directory = tmp_path_factory.mktemp("run") / "run"
    run_tiny(recipe_of(checkpoint, stream), directory)
    return directory


def test_the_penalty_is_there_from_the_second_task_on(finished: Path, logged: Callable[..., Any]) -> None:
    logs = logged(finished)
    assert len(logs) == 6
    assert not any("loss/orth" in log for log in logs[:3])
    assert all(log["loss/orth"] > 0 for log in logs[3:])


def test_older_adapters_stay_as_they_are(finished: Path) -> None:
    first = load_file(finished / "stages/01-fruit/model/task-fruit/adapter_model.safetensors")
    later = load_file(finished / "stages/02-metal/model/task-fruit/adapter_model.safetensors")
    assert first.keys() == later.keys()
    assert all(torch.equal(first[key], later[key]) for key in first)
    assert any(value.abs().sum() > 0 for key, value in first.items() if "lora_B" in key)


def test_the_exported_adapter_is_the_sum_of_the_stack(finished: Path) -> None:
    """In float64: W0 + sum over tasks of (alpha / rank) B A."""
    reference = tiny_model(dtype=torch.float64)
    weights = dict(reference.named_parameters())
    for name in ("fruit", "metal"):
        values = load_file(finished / f"stages/02-metal/model/task-{name}/adapter_model.safetensors")
        for key, a in values.items():
            if "lora_A" in key:
                b = values[key.replace("lora_A", "lora_B")]
                module = key.removeprefix("base_model.model.").split(".lora_A")[0]
                with torch.no_grad():
                    weights[f"{module}.weight"] += 2.0 * b.double() @ a.double()
    exported = PeftModel.from_pretrained(tiny_model(), finished / "adapter").eval()
    config = json.loads((finished / "adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    ids = torch.arange(3, 60)[None]
    expected = reference(ids).logits
    torch.testing.assert_close(exported(ids).logits.double(), expected, rtol=1e-4, atol=1e-5)
    assert (expected - tiny_model(dtype=torch.float64)(ids).logits).abs().max() > 1e-2


def test_a_resumed_run_equals_the_whole(
    finished: Path, checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "b")
    (tmp_path / "b/result.json").unlink()
    shutil.rmtree(tmp_path / "b/stages/02-metal")
    run_tiny(recipe_of(checkpoint, stream), tmp_path / "b", resume=True)
    assert (finished / "metrics.jsonl").read_text() == (tmp_path / "b/metrics.jsonl").read_text()
    name = "adapter/adapter_model.safetensors"
    assert (finished / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_penalty_keeps_new_directions_away_from_old_ones(
    finished: Path, checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    run_tiny(recipe_of(checkpoint, stream, {"lambda_orth": 0}), tmp_path / "free")
    assert losses(tmp_path / "free")[:3] == losses(finished)[:3]
    overlaps = []
    for directory in (finished, tmp_path / "free"):
        old, new = (
            load_file(directory / f"stages/02-metal/model/task-{name}/adapter_model.safetensors")
            for name in ("fruit", "metal")
        )
        overlaps.append(sum((old[k] @ new[k].T).abs().sum().item() for k in old if "lora_A" in k))
    assert overlaps[0] < 0.9 * overlaps[1]


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"alpha": 0},
        {"dropout": 1},
        {"lambda_orth": -1},
        {"lambda_norm": -1},
        {"form": "max"},
        {"r": 8},
    ],
)
def test_bad_options_are_refused(options: dict, checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=next(iter(options))) as caught:
        run_tiny(recipe_of(checkpoint, stream, options), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
