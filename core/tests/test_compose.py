"""Loss terms, gradient transforms and learning-rate factors on real trainer classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from graftwork import GradientTransform, LossTerm, PluginError, UserError
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork.train.compose import Composition, compose
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

TEXTS = [{"prompt": f"say {word}:", "completion": f" {word}"} for word in ("one", "two", "three", "four") * 4]
PAIRS = [{"prompt": f"say {i}:", "chosen": f" yes {i}", "rejected": " no"} for i in range(16)]
CASES = {
    "trainer": (Trainer, TrainingArguments, {}),
    "sft": (SFTTrainer, SFTConfig, {}),
    "dpo": (DPOTrainer, DPOConfig, {"precompute_ref_log_probs": True}),
}


def features(tokenizer: Any) -> list[dict[str, Any]]:
    rows = []
    for row in TEXTS:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"][:12]
        rows.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)})
    return rows


def build(kind: str, folder: Path, trainer_class: Any = None, **fields: Any) -> Any:
    plain, config, extra = CASES[kind]
    tokenizer = tiny_tokenizer()
    rows = features(tokenizer) if kind == "trainer" else PAIRS if kind == "dpo" else TEXTS
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 1,
    }
    more: dict[str, Any] = {}
    if kind == "trainer":
        from transformers import DataCollatorForTokenClassification

        more["data_collator"] = DataCollatorForTokenClassification(tokenizer)
    return (trainer_class or compose(plain))(
        model=tiny_model(seed=1),
        args=config(str(folder), **{**settings, **extra, **fields}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **more,
    )


def train(
    trainer: Any, composition: Composition | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    if composition is not None:
        trainer.attach(composition)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def weight_sum(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    return model.get_output_embeddings().weight.square().sum()


@pytest.mark.parametrize("kind", CASES)
def test_without_plugins_nothing_changes_to_the_bit(kind: str, tmp_path: Path) -> None:
    plain = train(build(kind, tmp_path / "a", CASES[kind][0]))
    ours = train(build(kind, tmp_path / "b"), Composition())
    assert plain[0] == ours[0]
    assert same(plain[1], ours[1])


@pytest.mark.parametrize("kind", CASES)
def test_a_term_changes_the_training_and_is_logged(kind: str, tmp_path: Path) -> None:
    trainer = build(kind, tmp_path)
    _, after = train(trainer, Composition([("p", LossTerm("decay", weight_sum, 0.1))]))
    assert not same(after, train(build(kind, tmp_path), Composition())[1])
    first = trainer.state.log_history[0]
    start = weight_sum(tiny_model(seed=1), None).item()
    assert first["loss/decay"] == pytest.approx(start, rel=1e-5)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("per", ["batch", "step"])
def test_the_gradient_of_a_term_does_not_depend_on_accumulation(kind: str, per: str, tmp_path: Path) -> None:
    """The term's own gradient at the first step equals that of weight * term, for 1 and 4 micro-batches."""
    expected = tiny_model(seed=1)
    (0.1 * weight_sum(expected, None)).backward()
    for steps in (1, 4):
        fields = {
            "max_steps": 1,
            "per_device_train_batch_size": 4 // steps,
            "gradient_accumulation_steps": steps,
            "max_grad_norm": 0.0,
        }
        seen: dict[str, torch.Tensor] = {}

        def keep(model: torch.nn.Module, seen: dict[str, torch.Tensor] = seen) -> None:
            seen["grad"] = model.get_output_embeddings().weight.grad.clone()

        watch = [("p", GradientTransform("watch", before_step=keep))]
        term = [("p", LossTerm("decay", weight_sum, 0.1, per=per))]
        train(build(kind, tmp_path, **fields), Composition(terms=term, transforms=watch))
        with_term = seen["grad"]
        train(build(kind, tmp_path, **fields), Composition(transforms=watch))
        difference = with_term - seen["grad"]
        torch.testing.assert_close(
            difference, expected.get_output_embeddings().weight.grad, rtol=1e-4, atol=1e-5
        )


def test_terms_survive_checkpointing_and_mixed_precision(tmp_path: Path) -> None:
    term = [("p", LossTerm("decay", weight_sum, 0.1))]
    plain, _ = train(build("sft", tmp_path, gradient_checkpointing=False), Composition(term))
    again, _ = train(build("sft", tmp_path, gradient_checkpointing=True), Composition(term))
    assert again == pytest.approx(plain, rel=1e-6)
    mixed, _ = train(build("sft", tmp_path, bf16=True), Composition(term))
    assert mixed == pytest.approx(plain, rel=0.02)
    assert mixed != plain


def test_transforms_run_before_clipping_and_after_the_step(tmp_path: Path) -> None:
    calls: list[str] = []

    def zero(model: torch.nn.Module) -> None:
        calls.append("before")
        for parameter in model.parameters():
            parameter.grad.zero_()

    parts = Composition(
        transforms=[("p", GradientTransform("zero", zero, lambda model: calls.append("after")))]
    )
    trainer = build("sft", tmp_path, gradient_accumulation_steps=2, max_steps=2, weight_decay=0.0)
    _, after = train(trainer, parts)
    assert calls == ["before", "after"] * 2
    assert same(after, dict(tiny_model(seed=1).named_parameters()))
    assert trainer.state.log_history[0]["grad_norm"] == 0


def test_learning_rate_factors_scale_the_first_step(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    start = dict(tiny_model(seed=1).named_parameters())[name]
    moved = {}
    for factor in (1.0, 0.5, 0.0):
        fields = {"max_steps": 1, "weight_decay": 0.0}
        _, after = train(build("sft", tmp_path, **fields), Composition(factors={name: factor}))
        moved[factor] = after[name] - start
    assert torch.equal(moved[0.0], torch.zeros_like(start))
    torch.testing.assert_close(moved[0.5], moved[1.0] / 2, rtol=1e-3, atol=1e-6)


def test_a_factor_is_applied_once_however_often_the_optimizer_is_asked_for(tmp_path: Path) -> None:
    """DeepSpeed's way to an optimizer asks twice."""
    trainer = build("sft", tmp_path, learning_rate=1e-2)
    trainer.attach(Composition(factors={"model.layers.0.mlp.up_proj.weight": 0.5}))
    for _ in range(2):
        optimizer = trainer.create_optimizer()
        assert sorted({group["lr"] for group in optimizer.param_groups}) == [5e-3, 1e-2]


def test_a_term_that_raises_names_its_plugin(tmp_path: Path) -> None:
    def broken(model: Any, batch: Any) -> torch.Tensor:
        raise ValueError("oops")

    with pytest.raises(PluginError, match="plugin 'culprit' failed in hook 'loss_terms': ValueError: oops"):
        train(build("sft", tmp_path), Composition([("culprit", LossTerm("x", broken))]))


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    nan = LossTerm("x", lambda model, batch: torch.tensor(float("nan")))
    with pytest.raises(UserError, match="the training loss is nan at step 1"):
        train(build("sft", tmp_path, logging_nan_inf_filter=False), Composition([("p", nan)]))
