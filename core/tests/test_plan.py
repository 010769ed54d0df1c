"""What a dry run counts: memory per GPU against sums by hand, steps, and files beside a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from graftwork import UserError
from graftwork.recipe import load
from graftwork.testing.runs import losses, run_tiny, tiny_recipe
from graftwork.train.footprint import Sharding, activations, state
from graftwork.train.plan import dry_run
from transformers import AutoConfig

LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}


def bytes_of(
    frozen: int = 0, trained: int = 0, sharding: Sharding | None = None, size: int = 2
) -> tuple[float, ...]:
    parts = state(frozen, trained, frozen_bytes=size, trained_bytes=4, sharding=sharding or Sharding())
    return parts.weights, parts.gradients, parts.optimizer


def test_without_deepspeed_every_gpu_holds_everything() -> None:
    """Half-precision frozen weights; fp32 adapters with a gradient and two moments."""
    assert bytes_of(100, 10) == (2 * 100 + 4 * 10, 4 * 10, 8 * 10)
    assert bytes_of(100, 10, Sharding(gpus=8)) == bytes_of(100, 10)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, (2 * 880, 2 * 80, 12 * 80)),
        (1, (2 * 880, 2 * 80, 12 * 80 / 8)),
        (2, (2 * 880, 2 * 80 / 8, 12 * 80 / 8)),
        (3, (2 * 880 / 8, 2 * 80 / 8, 12 * 80 / 8)),
    ],
)
def test_each_stage_shards_one_more_part(stage: int, expected: tuple[float, ...]) -> None:
    """ZeRO, section 3.1: 2 + 2 + 12 bytes a parameter in mixed precision."""
    assert bytes_of(800, 80, Sharding(gpus=8, stage=stage, half=True)) == expected


def test_full_precision_and_offloading() -> None:
    assert bytes_of(800, 80, Sharding(gpus=1, stage=2)) == (4 * 880, 4 * 80, 12 * 80)
    away = Sharding(gpus=8, stage=2, half=True, optimizer_offloaded=True)
    assert bytes_of(800, 80, away) == (2 * 880, 0, 0)
    assert "offloaded" in away.words()


def test_what_a_deepspeed_config_asks_for() -> None:
    config = {
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    assert Sharding.of({"deepspeed": config}, 4, half=True) == Sharding(4, 2, True, True, False)
    assert Sharding.of({"deepspeed": config}, 4, half=False).half is False
    assert Sharding.of({}, 4, half=True) == Sharding(4, None, True)


def test_fsdp_divides_everything_and_trains_in_full_precision(tmp_path: Path) -> None:
    config = tmp_path / "fsdp.json"
    config.write_text(json.dumps({"version": 2, "cpu_offload": True}))
    sharded = Sharding.of({"fsdp": True}, 8, half=True)
    assert sharded == Sharding(8, None, True, fsdp=True)
    assert bytes_of(800, 80, sharded) == ((2 * 800 + 4 * 80) / 8, 4 * 80 / 8, 8 * 80 / 8)
    assert "8 GPUs, FSDP2: optimizer state, gradients, weights sharded" in sharded.words()
    away = Sharding.of({"fsdp": True, "fsdp_config": str(config)}, 8, half=True)
    assert bytes_of(800, 80, away) == (0, 0, 0)
    assert away.words().endswith("all of it offloaded")


def llama(**changes: Any) -> Any:
    return AutoConfig.for_model(
        "llama",
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=50,
        **changes,
    )


def t5() -> Any:
    return AutoConfig.for_model(
        "t5", d_model=8, d_ff=16, num_layers=3, num_decoder_layers=2, num_heads=2, d_kv=4, vocab_size=50
    )


def test_activations_of_a_decoder() -> None:
    sizes: dict[str, Any] = {"rows": 2, "prompt": 7, "answer": 3, "compute_bytes": 2}
    block = 17 * 8 + 3 * 16
    whole = activations(llama(), checkpointing=False, **sizes)
    assert whole == 2 * 10 * (3 * block * 2 + 8 * 50)
    assert activations(llama(), checkpointing=True, **sizes) == 2 * 10 * ((3 * 8 + block) * 2 + 8 * 50)


def test_activations_of_an_encoder_decoder() -> None:
    """Logits for the answer only; cross-attention keeps keys and values of the prompt per decoder layer."""
    sizes: dict[str, Any] = {"rows": 2, "prompt": 7, "answer": 3, "compute_bytes": 4}
    block = 17 * 8 + 3 * 16
    kept = 7 * 3 * block + 3 * 2 * (block + 8 * 8) + 7 * 2 * (2 * 8)
    assert activations(t5(), checkpointing=False, **sizes) == 2 * (kept * 4 + 3 * 8 * 50)


# ---------------------------------------------------------------------- what is printed


def shown(capsys: pytest.CaptureFixture[str], recipe: Any, gpus: int = 1) -> dict[str, str]:
    capsys.readouterr()
    dry_run(recipe.jobs[0], gpus=gpus)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    return {name: value.strip() for name, _, value in (line.partition("  ") for line in lines)}


def test_more_gpus_mean_fewer_steps(
    checkpoint: Path, stream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {
        "max_steps": -1,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    recipe = tiny_recipe(checkpoint, stream, adapter=LORA, train=train)
    assert shown(capsys, recipe)["steps"] == "48 in 3 tasks (16, 16, 16)"
    rows = shown(capsys, recipe, gpus=3)
    assert rows["batch"] == "12 items a step: 2 x 2 accumulated x 3 GPUs"
    # 32 items: 2 whole batches of 12 and a part.
    assert rows["steps"] == "18 in 3 tasks (6, 6, 6)"


def test_a_stack_counts_the_adapters_of_all_tasks(
    checkpoint: Path, stream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = {"order": ["fruit", "metal", "colour"]}
    rows = {
        policy: shown(
            capsys,
            tiny_recipe(checkpoint, stream, adapter={**LORA, "r": 64, "policy": policy}, data_options=order),
        )
        for policy in ("shared", "stacked")
    }
    trained = int(rows["shared"]["trainable"].split()[0].replace(",", ""))
    sizes = {policy: float(row["weights"].split()[0]) * 2**20 for policy, row in rows.items()}
    assert sizes["stacked"] - sizes["shared"] == pytest.approx(2 * 4 * trained, abs=0.1 * 2**20)
    assert "with the adapters of 3 tasks" in rows["stacked"]["weights"]


def test_the_estimate_is_labelled_and_says_what_it_assumes(
    checkpoint: Path, stream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"deepspeed": {"zero_optimization": {"stage": 2}}}
    text = shown(capsys, tiny_recipe(checkpoint, stream, adapter=LORA, train=train), gpus=8)["memory"]
    assert "per GPU" in text
    assert "an estimate: 8 GPUs, ZeRO stage 2: optimizer state, gradients sharded" in text


# ---------------------------------------------------------------------- files beside the recipe


def test_a_deepspeed_config_is_found_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    (tmp_path / "a/b/recipe.yaml").write_text(
        "model: m\ndata: d\ntrain: {deepspeed: ../zero.json}\n"
        "steps: [{name: with}, {name: without, train: {deepspeed: null}}]\n"
    )
    expected = str((tmp_path / "a/zero.json").resolve())
    for place, path in ((tmp_path, Path("a/b/recipe.yaml")), (tmp_path / "a/b", Path("recipe.yaml"))):
        monkeypatch.chdir(place)
        jobs = load(path).jobs
        assert [spec.job.train["deepspeed"] for spec in jobs] == [expected, None]
    # What the command line says is meant from where one stands.
    job = load(Path("recipe.yaml"), sets=["train.deepspeed=../zero.json"]).jobs[0].job
    assert job.train["deepspeed"] == "../zero.json"


def test_a_name_that_is_no_file_beside_the_recipe_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: m\ndata: d\ntrain: {deepspeed: other/zero.json}\n")
    assert load(tmp_path / "recipe.yaml").jobs[0].job.train["deepspeed"] == "other/zero.json"


# ---------------------------------------------------------------------- fields per task


def test_a_task_can_have_its_own_steps(
    checkpoint: Path, stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(
        checkpoint,
        stream,
        adapter=LORA,
        data_options={"order": ["fruit", "metal"]},
        train={"max_steps": 2},
        per_task={"metal": {"max_steps": 3}},
    )
    assert shown(capsys, recipe)["steps"] == "5 in 2 tasks (2, 3)"
    run_tiny(recipe, tmp_path / "run")
    steps = [(task, step) for task, step, _ in losses(tmp_path / "run")]
    assert steps == [("fruit", 1), ("fruit", 2), ("metal", 1), ("metal", 2), ("metal", 3)]


@pytest.mark.parametrize(
    ("per_task", "said"),
    [
        ({"metall": {"max_steps": 3}}, "'metall', which is not in the stream (did you mean 'metal'?)"),
        ({"metal": {"optim": "sgd"}}, "per_task.metal.optim: a task may have its own num_train_epochs"),
        ({"metal": {"max_steps": "many"}}, "train.max_steps = 'many'"),
    ],
)
def test_fields_per_task_that_cannot_be_are_refused(
    per_task: dict[str, Any], said: str, checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(checkpoint, stream, adapter=LORA, per_task=per_task)
    with pytest.raises(UserError) as caught:
        run_tiny(recipe, tmp_path / "run")
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()
