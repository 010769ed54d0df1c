"""SpaRTA inside real trainer classes: gradients, preference pairs, restoration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from graftwork import GradientTransform
from graftwork.plugins import Plugins
from graftwork.run import Run
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork.testing.runs import tiny_recipe
from graftwork.train.compose import Composition, compose
from graftwork_sparta import branch_overlap, component_overlap, gate_values
from graftwork_sparta.plugin import Sparta, SpartaOptions
from graftwork_sparta.restore import Restoration
from peft import get_peft_model
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

# Equal lengths, so that halves of a batch have equally many answer tokens.
TEXTS = [{"prompt": f"say {w}:", "completion": f" {w} {i}"} for i, w in enumerate(["one", "two"] * 4)]
PAIRS = [{"prompt": f"say {i}:", "chosen": f" yes, say {i}", "rejected": " no"} for i in range(8)]
CASES = {
    "sft": (SFTTrainer, SFTConfig, TEXTS, {}),
    "dpo": (DPOTrainer, DPOConfig, PAIRS, {}),
    "dpo-precomputed": (DPOTrainer, DPOConfig, PAIRS, {"precompute_ref_log_probs": True}),
}
OPTIONS = {"rank_shared": 2, "rank_specific": 4, "block_layers": 2, "components": 3}


def build(kind: str, model: Any, folder: Path, options: dict[str, Any] | None = None, **fields: Any) -> Any:
    """Return a composed trainer with the plugin's hooks attached; ``trainer.seen`` collects gradients."""
    plain, config, rows, extra = CASES[kind]
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": 1,
    }
    trainer = compose(plain)(
        model=model,
        args=config(str(folder), **{**settings, **extra, **fields}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    recipe = tiny_recipe(folder, folder, plugins={"sparta": {**OPTIONS, **(options or {})}})
    run = Run(folder, recipe.jobs[0].job, Plugins.from_options({"sparta": {**OPTIONS, **(options or {})}}))
    parts = Composition.collect(run, trainer.model)
    trainer.seen = {}

    def keep(model: torch.nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                trainer.seen.setdefault(name, []).append(parameter.grad.clone())

    parts.transforms.append(("test", GradientTransform("watch", before_step=keep)))
    trainer.attach(parts)
    return trainer


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: many[0] for name, many in trainer.seen.items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        error = (gradient - right[name]).norm()
        assert error <= tolerance * gradient.norm() + 1e-8, name


@pytest.mark.parametrize(
    ("kind", "router"),
    [("sft", "prompt"), ("sft", "lineage"), ("dpo", "prompt"), ("dpo-precomputed", "prompt")],
)
def test_checkpointing_gives_the_same_gradients(adapt, tmp_path: Path, kind: str, router: str) -> None:
    results = []
    for checkpointing in (False, True):
        model = adapt(router=router, model={"num_hidden_layers": 4})
        fields = {
            "gradient_checkpointing": checkpointing,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }
        trainer = build(kind, model, tmp_path, {"router": router}, **fields)
        results.append(gradients(trainer))
        assert trainer.model.is_gradient_checkpointing == checkpointing
    assert any("router_w" in name and gradient.abs().sum() > 0 for name, gradient in results[0].items())
    assert_same(*results, tolerance=1e-4)


def test_accumulation_gives_the_same_gradients(adapt, tmp_path: Path) -> None:
    whole = gradients(build("sft", adapt(), tmp_path))
    halves = gradients(
        build("sft", adapt(), tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    )
    assert_same(whole, halves, tolerance=1e-4)


def test_the_terms_enter_loss_and_log_with_their_weights(adapt, tmp_path: Path) -> None:
    with_terms, without = adapt(), adapt()
    options = {"lambda_orth": 0.3, "mu": 0.7}
    trainer = build("sft", with_terms, tmp_path, options)
    seen = gradients(trainer)
    bare = gradients(build("sft", without, tmp_path, {"lambda_orth": 0, "mu": 0}))
    fresh = adapt()
    orth, comp = branch_overlap(fresh), component_overlap(fresh)
    (0.3 * orth + 0.7 * comp).backward()
    expected = {n: p.grad for n, p in fresh.named_parameters() if p.grad is not None}
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name] - bare[name], gradient, rtol=1e-3, atol=1e-5)
    log = trainer.state.log_history[0]
    assert log["loss/orth"] == pytest.approx(orth.item(), rel=1e-5)
    assert log["loss/components"] == pytest.approx(comp.item(), rel=1e-5)


def test_every_option_of_the_comparison_makes_a_difference(tmp_path: Path) -> None:
    """No two arms end alike, and all stay finite."""
    arms = [
        {},
        {"router": "off"},
        {"router": "lineage"},
        {"router": "lineage", "lineage_pool": "prompt"},
        {"lambda_orth": 0},
        {"mu": 0},
        {"orth": "both"},
        {"orth_mode": "project"},
        {"shared_lr": 0.1},
        {"scale": 2.0},
        {"init": "lineage"},
        {"dropout": 0.5},
    ]
    ends = []
    for arm in arms:
        options = SpartaOptions(**{**OPTIONS, **arm})
        model = tiny_model()
        torch.manual_seed(3)
        model = get_peft_model(model, Sparta(options).adapter_config(None, model))
        build("sft", model, tmp_path, arm, max_steps=3).train()
        ends.append(torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "sparta_" in n]))
        assert torch.isfinite(ends[-1]).all(), arm
    sums = [values.double().sum().item() for values in ends]
    assert len(set(sums)) == len(arms)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["orth", "components"]),
        ({"lambda_orth": 0}, ["components"]),
        ({"mu": 0}, ["orth"]),
        ({"router": "off"}, ["orth"]),
        ({"orth_mode": "project"}, ["components"]),
        ({"rank_shared": 0}, ["components"]),
    ],
)
def test_which_terms_there_are(options: dict[str, Any], names: list[str]) -> None:
    terms = Sparta(SpartaOptions(**{**OPTIONS, **options})).loss_terms(None, torch.nn.Module())
    assert [term.name for term in terms] == names
    assert all(term.per == "step" for term in terms)


@pytest.mark.parametrize("kind", ["dpo", "dpo-precomputed"])
def test_preference_training_gates_both_answers_alike(adapt, tmp_path: Path, kind: str) -> None:
    """Chosen and rejected rows share their prompt, so they share their gates; the reference does not move."""
    model = adapt()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = build(kind, model, tmp_path, max_steps=2)
    trainer.train()
    gates = gate_values(trainer.model, "default")
    assert gates.shape == (8, 1, 2)
    torch.testing.assert_close(gates[:4], gates[4:], rtol=1e-5, atol=1e-5)
    assert gates.std() > 1e-3
    assert {"loss", "loss/orth", "rewards/margins"} <= set(trainer.state.log_history[0])
    after = dict(trainer.model.named_parameters())
    changed = {n for n, old in before.items() if not torch.equal(after[n], old)}
    assert any("sparta_specific_B" in name for name in changed)
    assert all(".default" in name for name in changed)
    assert not any(parameter.requires_grad for name, parameter in after.items() if ".ref" in name)


def test_preference_batches_without_labels_are_gated_by_their_prompt(adapt, batch) -> None:
    """What a trainer passes that marks the answer with a mask of its own."""
    adapted = adapt()
    plugin = Sparta(SpartaOptions(**OPTIONS))
    adapted(**batch)
    expected = gate_values(adapted)
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    completion = (batch["labels"] != -100).long()
    plugin.batch_begin(None, adapted, {**given, "completion_mask": completion})
    adapted(**given)
    assert torch.equal(gate_values(adapted), expected)
    adapted(**given)
    assert not torch.equal(gate_values(adapted), expected)


def test_rollout_batches_are_gated_by_their_prompt(adapt, batch) -> None:
    """Policy-gradient trainers keep prompt and completion in tensors of their own."""
    adapted = adapt()
    plugin = Sparta(SpartaOptions(**OPTIONS))
    adapted(**batch)
    expected = gate_values(adapted)
    mask = batch["attention_mask"]
    parts = {"prompt_mask": mask[:, :6], "completion_mask": mask[:, 6:]}
    plugin.batch_begin(None, adapted, parts)
    adapted(input_ids=batch["input_ids"], attention_mask=mask)
    assert torch.equal(gate_values(adapted), expected)


def test_the_shared_branch_can_learn_at_its_own_rate(adapt, tmp_path: Path) -> None:
    """Adam's first step has the length of the learning rate."""
    model = adapt()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    build("sft", model, tmp_path, {"shared_lr": 0.25, "mu": 0}, weight_decay=0.0).train()
    for name, parameter in model.named_parameters():
        step = (parameter.detach() - before[name]).abs().max().item()
        if "sparta_shared" in name:
            assert step == pytest.approx(0.25e-2, rel=1e-2), name
        elif "sparta_specific" in name:
            assert step == pytest.approx(1e-2, rel=1e-2), name


# ---------------------------------------------------------------- restoration


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (1.0, 1.0), (0.25, 0.25)])
def test_restoration(adapt, scramble, probability: float, share: float) -> None:
    model = adapt()
    restoration = Restoration(every=2, probability=probability, seed=3)
    restoration.begin(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    moved = {n: p.detach().clone() for n, p in model.named_parameters()}
    restoration.after_step(model)
    assert all(torch.equal(p, moved[n]) for n, p in model.named_parameters())
    restoration.after_step(model)
    back = total = 0
    for name, parameter in model.named_parameters():
        if name in start:
            restored = parameter == start[name]
            assert torch.equal(parameter[~restored], moved[name][~restored])
            back, total = back + restored.sum().item(), total + restored.numel()
        else:
            assert torch.equal(parameter, moved[name]), name
    assert back / total == pytest.approx(share, abs=0 if share in (0, 1) else 0.03)


def test_restoration_goes_on_where_it_stopped(adapt) -> None:
    plugin, again = (
        Sparta(SpartaOptions(**OPTIONS, restore_every=1, restore_probability=0.5)) for _ in range(2)
    )
    assert plugin.save_state(None) is None
    models = []
    for one in (plugin, again):
        one.restoration = Restoration(1, 0.5, seed=3)
        models.append(adapt())
        one.restoration.begin(models[-1])
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.add_(1.0)
    plugin.restoration.after_step(models[0])
    models[1].load_state_dict(models[0].state_dict())
    again.restoration.start = {}
    again.load_state(None, plugin.save_state(None))
    for one, model in zip((plugin, again), models, strict=True):
        one.restoration.after_step(model)
    for (name, left), right in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(left, right), name
    assert again.restoration.step == 2
    base = dict(tiny_model().named_parameters())
    assert len(plugin.restoration.start) < len(list(models[0].parameters())) - len(base) + 1
