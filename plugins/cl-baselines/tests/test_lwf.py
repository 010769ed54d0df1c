"""LwF: the distance in float64, old and new logits against the plain model, whole runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.testing.models import tiny_model
from graftwork.testing.runs import losses, run_tiny, tiny_recipe
from graftwork.train import checkpoints
from graftwork_cl_baselines import lwf
from graftwork_cl_baselines.distil import SCALES, Watch, answers, distance, scaled_logits
from graftwork_cl_baselines.lwf import Lwf, LwfOptions
from graftwork_cl_baselines.quadratic import trained_parameters
from peft import PeftModel
from safetensors.torch import load_file

LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
ADAPTERS = {"lora": LORA, "full": None}


def recipe_of(checkpoint: Path, stream: Path, options: dict | None = None, **changes: Any) -> Any:
    changes = {"train": {"max_steps": 3}, "evaluate": {"cells": "final"}, "adapter": LORA, **changes}
    return tiny_recipe(checkpoint, stream, plugins={"lwf": options or {}}, seed=1, **changes)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 39).view(3, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.clone()
    labels[:, :6] = -100
    labels[1, 8:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def model_of(kind: str, stacked: Callable[..., PeftModel], **changes: Any) -> Any:
    return stacked(1, moved=True) if kind == "lora" else tiny_model(**changes)


def move(model: torch.nn.Module, by: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter += by * torch.randn(parameter.shape, generator=generator)


# ---------------------------------------------------------------------- the formula


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_distance_by_hand(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 3, 6, dtype=torch.float64, generator=generator)
    total = 0.0
    for before, now in zip(old.tolist(), new.tolist(), strict=True):
        p, q = ([math.exp(z / temperature) for z in row] for row in (before, now))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    value = distance(old, new, temperature).item()
    assert value == pytest.approx(temperature**2 * total / 3, rel=1e-5)
    assert distance(old, old, temperature).item() == pytest.approx(0, abs=1e-6)
    assert value != pytest.approx(distance(new, old, temperature).item(), rel=1e-2)


def test_no_answer_token_costs_nothing_and_has_a_gradient() -> None:
    new = torch.randn(0, 5, requires_grad=True)
    value = distance(torch.randn(0, 5), new, 2.0)
    assert value.item() == 0
    value.backward()


def test_which_positions_predict_an_answer() -> None:
    labels = torch.tensor([[-100, -100, 5, 6], [7, -100, -100, 8]])
    # Nothing predicts the first token, and the last position predicts nothing.
    assert answers(labels).tolist() == [[False, True, True, False], [False, False, True, False]]


# ---------------------------------------------------------------------- old and new logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_old_and_new_logits_are_those_of_the_models(
    kind: str, tied: bool, stacked: Callable[..., PeftModel]
) -> None:
    model = model_of(kind, stacked, tie_word_embeddings=tied).train()
    watch, data = Watch(model), batch()
    before = {name: value.detach().clone() for name, value in trained_parameters(model).items()}
    untouched = copy.deepcopy(model).eval()
    move(model)
    kept = answers(data["labels"])
    output = model(**data)
    new, old = watch.new_logits(data["labels"]), watch.old_logits(data, before)
    assert new.shape == (int(kept.sum()), model.config.vocab_size) == (6 + 2 + 6, 259)
    torch.testing.assert_close(new, output.logits[kept], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(old, untouched(**data).logits[kept], rtol=1e-5, atol=1e-6)
    assert not old.requires_grad
    assert (old - new).abs().max() > 1e-2
    assert model.training
    # The swap left no trace.
    torch.testing.assert_close(model(**data).logits, output.logits, rtol=0, atol=0)
    watch.close()


@pytest.mark.parametrize("tied", [False, True])
def test_old_and_new_logits_of_an_encoder_decoder(tied: bool) -> None:
    """Its labels stand where they are predicted; T5 with tied embeddings scales what enters the head."""
    model = tiny_model("t5", tie_word_embeddings=tied, dropout_rate=0.0).train()
    assert model.config.is_encoder_decoder
    watch, data = Watch(model), batch()
    before = {name: value.detach().clone() for name, value in trained_parameters(model).items()}
    untouched = copy.deepcopy(model).eval()
    move(model)
    kept = data["labels"] != -100
    output = model(**data)
    new, old = watch.new_logits(data["labels"]), watch.old_logits(data, before)
    torch.testing.assert_close(new, output.logits[kept], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(old, untouched(**data).logits[kept], rtol=1e-5, atol=1e-5)
    assert (old - new).abs().max() > 1e-2
    # Taking the logits is no forward pass of the model.
    with pytest.raises(UserError, match="saw no forward pass"):
        watch.new_logits(data["labels"])
    watch.close()


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_gradient_is_that_of_the_plain_distance(
    kind: str, checkpointing: dict | None, stacked: Callable[..., PeftModel]
) -> None:
    """Through the caught hidden state, with gradient checkpointing or without, as through the model's logits."""
    model, data = model_of(kind, stacked).train(), batch()
    before = {name: value.detach().clone() for name, value in trained_parameters(model).items()}
    move(model, 0.3 if kind == "lora" else 0.05)
    reference = copy.deepcopy(model).double()
    old = copy.deepcopy(model).double()
    old.load_state_dict(before, strict=False)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(checkpointing)
    watch = Watch(model)
    model(**data)
    new = watch.new_logits(data["labels"])
    distance(watch.old_logits(data, before), new, 2.0).backward()
    kept = answers(data["labels"])
    with torch.no_grad():
        target = torch.softmax(old(**data).logits[kept] / 2, -1)
    logs = torch.log_softmax(reference(**data).logits[kept] / 2, -1)
    (4 * (target * (target.log() - logs)).sum(-1).mean()).backward()
    expected = {name: value.grad for name, value in trained_parameters(reference).items()}
    found = {name: value.grad for name, value in trained_parameters(model).items()}
    assert found.keys() == expected.keys()
    scale = max(value.abs().max().item() for value in expected.values())
    assert scale > 1e-4
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=2e-3, atol=1e-4 * scale)


def test_passes_that_are_none_of_the_loss_are_not_taken_for_it() -> None:
    model, data = tiny_model().train(), batch()
    watch = Watch(model)
    with torch.no_grad():
        model(**data)
    model.eval()
    model(**data)
    with pytest.raises(UserError, match="saw no forward pass"):
        watch.new_logits(data["labels"])
    model.train()
    model(**data)
    watch.new_logits(data["labels"])
    with pytest.raises(UserError, match="saw no forward pass"):
        watch.new_logits(data["labels"])
    watch.close()
    model(**data)
    assert watch.last is None


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_run_distils_and_resumes_to_the_same_bits(
    kind: str, checkpoint: Path, stream: Path, resumes_with_term: Callable[..., Path]
) -> None:
    train = {
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "learning_rate": 3e-3,
    }
    recipe = recipe_of(checkpoint, stream, train=train, adapter=ADAPTERS[kind])
    resumes_with_term(recipe, None, "lwf", rounding=1e-6)


def test_the_snapshot_is_in_the_checkpoints_of_its_task_only(
    checkpoint: Path, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[tuple[str, set[str]]] = []
    original = checkpoints.save_plugin_states

    def note(run: Any, folder: Path) -> int:
        size = original(run, folder)
        path = folder / "plugins/lwf.safetensors"
        saved.append((folder.name, set(load_file(path)) if path.exists() else set()))
        return size

    monkeypatch.setattr(checkpoints, "save_plugin_states", note)
    train = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    result = run_tiny(recipe_of(checkpoint, stream, train=train), tmp_path / "run")
    kept = [bool(names) for _, names in saved]
    assert kept == [False, False, True, True]
    assert all(".default." in name for name in saved[-1][1])
    assert result["extra_state_bytes"] == 0


def test_strength_0_is_sequential_lora_and_the_first_task_is_an_option(
    checkpoint: Path, stream: Path, tmp_path: Path, logged: Callable[..., Any]
) -> None:
    runs = {"on": {}, "off": {"strength": 0}, "first": {"first_task": True}}
    for name, options in runs.items():
        run_tiny(recipe_of(checkpoint, stream, options), tmp_path / name)
    plain = tiny_recipe(
        checkpoint, stream, seed=1, adapter=LORA, train={"max_steps": 3}, evaluate={"cells": "final"}
    )
    run_tiny(plain, tmp_path / "plain")
    on, off, first, without = (losses(tmp_path / name) for name in ("on", "off", "first", "plain"))
    assert off == without
    assert on[:3] == without[:3]
    assert on[4:] != without[4:]
    assert first[1:3] != without[1:3]
    assert all("loss/lwf" in log for log in logged(tmp_path / "first"))


def test_a_stronger_distillation_stays_closer_to_the_old_predictions(
    checkpoint: Path, stream: Path, tmp_path: Path, logged: Callable[..., Any]
) -> None:
    ends = []
    for strength in (1e-6, 1e2):
        train = {"max_steps": 10, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
        folder = tmp_path / f"s{strength}"
        run_tiny(recipe_of(checkpoint, stream, {"strength": strength}, train=train), folder)
        ends.append(logged(folder)[-1]["loss/lwf"])
    assert ends[1] < 0.5 * ends[0]


def test_a_stack_is_distilled_too(
    checkpoint: Path, stream: Path, tmp_path: Path, logged: Callable[..., Any]
) -> None:
    """With a fresh adapter per task the old model is the one in which the new B is zero."""
    recipe = recipe_of(checkpoint, stream, adapter={**LORA, "policy": "stacked"})
    run_tiny(recipe, tmp_path / "run")
    values = [log.get("loss/lwf") for log in logged(tmp_path / "run")]
    assert values[:3] == [None] * 3
    assert abs(values[3]) < 1e-6
    assert min(values[4:]) > 1e-6


# ---------------------------------------------------------------------- refusals


def test_models_that_change_their_logits_are_refused() -> None:
    assert scaled_logits(tiny_model().config) is None
    run = SimpleNamespace(job=SimpleNamespace(model=SimpleNamespace(ref="some/model")))
    for field in SCALES:
        model = tiny_model()
        setattr(model.config, field, 30.0)
        assert scaled_logits(model.config) == field
        with pytest.raises(UserError, match=f"'some/model' changes them \\('{field}'") as caught:
            Lwf(LwfOptions()).adapter_config(run, model)
        assert "\n" not in str(caught.value)
        setattr(model.config, field, 1.0)
        assert Lwf(LwfOptions()).adapter_config(run, model) is None


def test_what_no_hidden_state_can_tell_is_refused() -> None:
    model, data = tiny_model().train(), batch()
    plugin = Lwf(LwfOptions(first_task=True))
    (term,) = plugin.loss_terms(SimpleNamespace(), model)
    model(**data)
    with pytest.raises(UserError, match="'labels'"):
        term.fn(model, {"input_ids": data["input_ids"]})
    with pytest.raises(UserError, match="virtual tokens"):
        term.fn(model, {**data, "labels": data["labels"][:, :-1]})
    plugin.task_end(None, None, None)
    assert plugin.watch is None
    assert lwf.Lwf.save_state(plugin, None) == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"algorithm": "dpo"}, "algorithm: sft"),
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
    "options", [{"strength": -1}, {"temperature": 0}, {"first_task": "maybe"}, {"lambda": 1}]
)
def test_bad_options_are_refused(options: dict, checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=next(iter(options))) as caught:
        run_tiny(recipe_of(checkpoint, stream, options), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
