"""Whole jobs with the plugin: streams, resumption, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.data.stream import build_stream
from graftwork.evaluate.answers import score_task
from graftwork.generate import Decoding
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork.testing.runs import losses, run_tiny, tiny_recipe
from graftwork_sparta import plugin, prompt_context
from graftwork_sparta.plugin import Sparta, SpartaOptions
from graftwork_sparta.prompt import PromptContext
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig

OPTIONS = {"rank_shared": 1, "rank_specific": 2, "block_layers": 1, "components": 2}
ADAPTER = "adapter_model.safetensors"


def recipe_of(checkpoint: Path, stream: Path, options: dict[str, Any] | None = None, **settings: Any) -> Any:
    settings.setdefault("train", {"max_steps": 3})
    return tiny_recipe(
        checkpoint, stream, plugins={"sparta": {**OPTIONS, **(options or {})}}, seed=1, **settings
    )


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.fixture(scope="module")
def recipe(checkpoint: Path, stream: Path) -> Any:
    """Two tasks with everything that carries state: growth, a branch per task, restoration, checkpoints."""
    options = {"specific": "per_task", "restore_every": 1, "restore_probability": 0.3}
    return recipe_of(
        checkpoint, stream, options, train={"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    )


@pytest.fixture(scope="module")
def whole(recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of that run, finished in one go."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    run_tiny(recipe, directory)
    return directory


def test_a_stream_grows_freezes_and_saves(checkpoint: Path, whole: Path, batch) -> None:
    result = json.loads((whole / "result.json").read_text())
    assert [len(row) for row in result["scores"]] == [2, 2, 2]
    assert len(losses(whole)) == 8
    for event in events(whole, "log"):
        assert event["loss/orth"] > 0
        assert event["loss/components"] >= 0
    assert [event["task"] for event in events(whole, "gates")] == result["order"]
    assert all(0 < event["mean_from_1"] <= event["most"] < 1 for event in events(whole, "gates"))
    first, second = (load_file(stage / "model" / ADAPTER) for stage in sorted((whole / "stages").iterdir()))
    compared = 0
    for key, old in second.items():
        for frozen, trained, axis in (
            ("sparta_old_A", "sparta_router_A", 1),
            ("sparta_old_K", "sparta_router_K", 1),
            ("sparta_old_w", "sparta_router_w", 1),
            ("sparta_frozen_A", "sparta_specific_A", 0),
            ("sparta_frozen_B", "sparta_specific_B", 1),
        ):
            if frozen in key:
                before = first[key.replace(frozen, trained)]
                assert torch.equal(old, torch.cat([first[key], before], axis)), key
                assert not torch.equal(second[key.replace(frozen, trained)], before), key
                compared += 1
    assert compared == 2 * 3 + 14 * 2
    config = json.loads((whole / "adapter/adapter_config.json").read_text())
    assert (config["tasks"], config["base_model_name_or_path"]) == (2, str(checkpoint))
    saved = load_file(whole / "adapter" / ADAPTER)
    assert all(torch.equal(saved[key], value) for key, value in second.items())
    loaded = PeftModel.from_pretrained(tiny_model(), whole / "adapter").eval()
    assert not torch.allclose(loaded(**batch).logits, tiny_model()(**batch).logits, atol=1e-3)


def test_the_score_is_that_of_the_saved_adapter(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    recipe = recipe_of(checkpoint, stream, train={"max_steps": 8})
    result = run_tiny(recipe, tmp_path / "run")
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "run/adapter").eval()
    tokenizer = tiny_tokenizer()
    tasks = build_stream(recipe.jobs[0].job.data, seed=1, tokenizer=tokenizer)
    contexts = prompt_context(loaded)
    for column, task in enumerate(tasks):
        score = score_task(
            loaded, tokenizer, task, decoding=Decoding(contexts=lambda: [contexts.generation()])
        )
        assert score.accuracy == result["scores"][-1][column]
        assert [int(value) for value in score.correct] == result["items"][-1][column]


def test_the_prompt_ends_where_the_answer_begins(
    checkpoint: Path, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = PromptContext.begin

    def spy(self, module, args, kwargs):
        original(self, module, args, kwargs)
        if kwargs.get("labels") is not None and self.now.mask is not None:
            seen.append((self.now.mask.clone(), kwargs["labels"].clone()))

    monkeypatch.setattr(PromptContext, "begin", spy)
    recipe = recipe_of(checkpoint, stream, train={"max_steps": 2}, evaluate={"cells": "final"})
    run_tiny(recipe, tmp_path / "run")
    assert len(seen) == 4
    for mask, labels in seen:
        first = (labels != -100).int().argmax(1)
        assert (mask.sum(1) == first).all()
        assert (first > 5).all()


def test_resuming_between_tasks_is_exact(recipe: Any, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "b")
    (tmp_path / "b/result.json").unlink()
    shutil.rmtree(sorted((tmp_path / "b/stages").iterdir())[1])
    again = run_tiny(recipe, tmp_path / "b", resume=True)
    assert (tmp_path / "b/metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert again["scores"] == json.loads((whole / "result.json").read_text())["scores"]
    assert adapter_bytes(tmp_path / "b") == adapter_bytes(whole)


def test_resuming_inside_a_task_is_exact(
    recipe: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second task's third step, after its checkpoint."""
    original, calls = plugin.component_overlap, []

    def cut(model: torch.nn.Module) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(model)

    monkeypatch.setattr(plugin, "component_overlap", cut)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(recipe, tmp_path / "b")
    monkeypatch.undo()
    kept = list((tmp_path / "b/stages/current").glob("checkpoint-*"))
    assert [folder.name for folder in kept] == ["checkpoint-2"]
    again = run_tiny(recipe, tmp_path / "b", resume=True)
    assert losses(tmp_path / "b")[-2:] == losses(whole)[-2:]
    assert again["scores"] == json.loads((whole / "result.json").read_text())["scores"]
    assert adapter_bytes(tmp_path / "b") == adapter_bytes(whole)


def adapter_bytes(directory: Path) -> bytes:
    return (directory / "adapter" / ADAPTER).read_bytes()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "settings", "said"),
    [
        ({"rank_shared": 2}, {}, "rank_specific = 2 must be larger than rank_shared = 2"),
        ({"rank_shared": 5}, {}, "rank_specific = 2 must be larger than rank_shared = 5"),
        ({"rank": 5}, {}, "rank"),
        ({"router": "top"}, {}, "router"),
        ({"components": 0}, {}, "components"),
        ({"block_layers": 0}, {}, "block_layers"),
        ({}, {"train": {"packing": True}}, "train.packing takes apart; remove it or set"),
        ({}, {"train": {"padding_free": True}}, "train.padding_free takes apart; remove it or set"),
        (
            {},
            {"train": {"gradient_checkpointing_kwargs": {"use_reentrant": True}}},
            "set train.gradient_checkpointing_kwargs.use_reentrant: false",
        ),
        (
            {},
            {"adapter": {"peft_type": "LORA", "target_modules": "all-linear"}},
            "plugin 'sparta' brings a whole-model adapter",
        ),
    ],
)
def test_refusals_before_anything_is_written(
    options, settings, said, checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        run_tiny(recipe_of(checkpoint, stream, options, **settings), tmp_path / "run")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_layers": 4}, "block_layers = 4, but the model has 2 decoder layers"),
        (
            {"rank_specific": 20},
            "'model.layers.0.self_attn.k_proj': SpaRTA: rank 20 is larger than a target layer of 32 inputs and 16",
        ),
        ({"target_modules": ["nothing"]}, "Target modules"),
        (
            {"target_modules": ["embed_tokens"]},
            "'model.embed_tokens': SpaRTA adapts linear layers; Embedding is none",
        ),
        ({"target_modules": ["lm_head"]}, "'lm_head' is outside"),
        ({"components": 20}, "task 2 with 20 components does not fit the hidden size 32; lower 'components'"),
    ],
)
def test_refusals_that_need_the_model(options, said, checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    recipe = recipe_of(checkpoint, stream, options, train={"max_steps": 1}, evaluate={"cells": "final"})
    with pytest.raises(UserError) as caught:
        run_tiny(recipe, tmp_path / "run")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_text_stream_without_prompts(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": f"row {i} of text"}) for i in range(16))
    )
    recipe = recipe_of(checkpoint, tmp_path / "texts.jsonl", {"prompt_fallback": "refuse"})
    with pytest.raises(UserError, match=r"no prompt token.*set prompt_fallback: half") as caught:
        run_tiny(recipe, tmp_path / "run")
    assert "\n" not in str(caught.value)
    run_tiny(recipe_of(checkpoint, tmp_path / "texts.jsonl"), tmp_path / "other")


def test_resuming_with_other_ranks_is_refused(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    short = {"train": {"max_steps": 1}, "evaluate": {"cells": "final"}}
    run_tiny(recipe_of(checkpoint, stream, **short), tmp_path / "run")
    other = recipe_of(checkpoint, stream, {"rank_specific": 3}, **short)
    with pytest.raises(UserError, match="belongs to a run with other settings: 'plugins'") as caught:
        run_tiny(other, tmp_path / "run", resume=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_models_that_do_not_read_left_to_right_need_the_router_off(kind: str) -> None:
    class Model:
        config = AutoConfig.for_model(kind)

    with pytest.raises(UserError, match=f"'{kind}' is .*; set plugins.sparta.router: off") as caught:
        Sparta(SpartaOptions()).adapter_config(None, Model())
    assert "\n" not in str(caught.value)
    assert Sparta(SpartaOptions(router="off")).adapter_config(None, Model()).router == "off"


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2"])
def test_decoders_are_not_refused(kind: str) -> None:
    config = Sparta(SpartaOptions(rank_shared=3, scale=0.5)).adapter_config(None, tiny_model(kind))
    assert (config.rank_shared, config.rank_specific, config.scale, config.router) == (3, 8, 0.5, "prompt")
