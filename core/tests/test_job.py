"""Whole jobs on a tiny model: streams, policies, scores, exports, resume, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.recipe import Job
from graftwork.run import Run
from graftwork.testing.models import tiny_model
from graftwork.testing.runs import losses, run_tiny, tiny_recipe
from graftwork.train.checkpoints import STAGE, finished_stages
from graftwork.train.stream import Stream
from peft import PeftModel
from safetensors.torch import load_file

LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}


def test_a_stream_fills_the_score_matrix(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    result = run_tiny(tiny_recipe(checkpoint, stream, adapter=LORA), tmp_path / "run")
    assert result["order"] == ["colour", "fruit", "metal"]
    assert [len(row) for row in result["scores"]] == [3, 3, 3, 3]
    assert all(value is not None for row in result["scores"] for value in row)
    assert json.loads((tmp_path / "run/result.json").read_text()) == result
    assert set(result["metrics"]) >= {"ap", "la", "bwt", "fwt", "forgetting", "stage_average"}
    assert len(losses(tmp_path / "run")) == 3 * 6


@pytest.mark.parametrize(
    ("cells", "filled"),
    [
        ("seen", [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]),
        ("ends", [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 1]]),
        ("final", [[0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 1, 1]]),
    ],
)
def test_which_cells_are_measured(
    cells: str, filled: list, checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(checkpoint, stream, adapter=LORA, train={"max_steps": 1}, evaluate={"cells": cells})
    scores = run_tiny(recipe, tmp_path / "run")["scores"]
    assert [[int(value is not None) for value in row] for row in scores] == filled


def test_a_saved_adapter_gives_the_logits_of_the_run(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    """Joined stacks of adapters compute the sum of the stack."""
    ids = torch.arange(3, 40)[None]
    outputs = {}
    for policy in ("shared", "stacked"):
        folder = tmp_path / policy
        run_tiny(tiny_recipe(checkpoint, stream, adapter={**LORA, "policy": policy}), folder)
        config = json.loads((folder / "adapter/adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(checkpoint)
        model = PeftModel.from_pretrained(tiny_model(), folder / "adapter").eval()
        outputs[policy] = model(ids).logits
    assert config["r"] == 3 * LORA["r"]
    stages = sorted((tmp_path / "stacked/stages").iterdir())
    summed = tiny_model()
    for index, adapter in enumerate(sorted((stages[-1] / "model").glob("*/"))):
        name = f"a{index}"
        if index == 0:
            summed = PeftModel.from_pretrained(summed, adapter, adapter_name=name)
        else:
            summed.load_adapter(adapter, adapter_name=name)
    summed.base_model.set_adapter([f"a{index}" for index in range(3)])
    torch.testing.assert_close(summed.eval()(ids).logits, outputs["stacked"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(outputs["shared"], outputs["stacked"])


def test_separate_adapters_never_forget(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(checkpoint, stream, adapter={**LORA, "policy": "separate"}, train={"max_steps": 12})
    result = run_tiny(recipe, tmp_path / "run")
    assert result["metrics"]["bwt"] == 0
    first = load_file(tmp_path / "run/stages/01-colour/model/task-colour/adapter_model.safetensors")
    last = load_file(tmp_path / "run/stages/03-metal/model/task-colour/adapter_model.safetensors")
    assert all(torch.equal(first[key], last[key]) for key in first)


def test_full_weights_keep_only_the_newest_stage(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    result = run_tiny(tiny_recipe(checkpoint, stream, train={"max_steps": 2}), tmp_path / "run")
    assert result["output"] == "model"
    assert (tmp_path / "run/model/model.safetensors").exists()
    kept = [(p / "model").exists() for p in sorted((tmp_path / "run/stages").iterdir())]
    assert kept == [False, False, True]


def test_no_pickle_is_left_behind(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(checkpoint, stream, adapter=LORA, train={"save_strategy": "steps", "save_steps": 2})
    run_tiny(recipe, tmp_path / "run")
    assert not [p for p in (tmp_path / "run").rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.parametrize("policy", ["shared", "stacked", "separate", None])
def test_resuming_between_tasks_is_exact(
    policy: str | None, checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    """Cut a finished run back to one finished task; going on gives the same record and scores."""
    import shutil

    adapter = {**LORA, "policy": policy} if policy else None
    recipe = tiny_recipe(checkpoint, stream, adapter=adapter, train={"max_steps": 3})
    whole = run_tiny(recipe, tmp_path / "a")
    if policy is None:
        # Stages of full weights are thinned out, so the cut run is stopped instead.
        with pytest.MonkeyPatch.context() as patch:
            original = Stream._learn

            def stop(self, task):
                if task.index == 1:
                    raise KeyboardInterrupt
                original(self, task)

            patch.setattr(Stream, "_learn", stop)
            with pytest.raises(KeyboardInterrupt):
                run_tiny(recipe, tmp_path / "b")
    else:
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        (tmp_path / "b/result.json").unlink()
        for stage in sorted((tmp_path / "b/stages").iterdir())[1:]:
            shutil.rmtree(stage)
    again = run_tiny(recipe, tmp_path / "b", resume=True)
    assert (tmp_path / "a/metrics.jsonl").read_text() == (tmp_path / "b/metrics.jsonl").read_text()
    assert again["scores"] == whole["scores"]
    for name in ("adapter", "model"):
        for file in (tmp_path / "a" / name).rglob("*.safetensors"):
            other = tmp_path / "b" / file.relative_to(tmp_path / "a")
            assert file.read_bytes() == other.read_bytes()


def test_a_stage_that_a_kill_kept_from_its_place_is_not_finished(tmp_path: Path) -> None:
    job = Job.model_validate({"model": {"ref": "tiny-random"}, "data": {"source": "tiny"}})
    run = Run(tmp_path, job)
    for name in ("01-fruit", ".02-metal-0a1b2c3d.part"):
        (run.stages / name).mkdir(parents=True)
        (run.stages / name / STAGE).write_text("{}")
    assert finished_stages(run, ["fruit", "metal"]) == [run.stages / "01-fruit"]
    with pytest.raises(UserError, match="holds finished tasks that this stream does not have"):
        finished_stages(run, ["metal"])


def test_a_finished_run_is_not_run_again(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(checkpoint, stream, adapter=LORA, train={"max_steps": 1})
    first = run_tiny(recipe, tmp_path / "run")
    stamp = (tmp_path / "run/metrics.jsonl").stat().st_mtime_ns
    assert run_tiny(recipe, tmp_path / "run", resume=True) == first
    assert (tmp_path / "run/metrics.jsonl").stat().st_mtime_ns == stamp


def refused(recipe, directory: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        run_tiny(recipe, directory, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals_about_the_run_directory(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(checkpoint, stream, adapter=LORA, train={"max_steps": 1})
    run_tiny(recipe, tmp_path / "run")
    assert "add --resume" in refused(recipe, tmp_path / "run")
    other = tiny_recipe(checkpoint, stream, adapter=LORA, train={"max_steps": 2})
    assert "belongs to a run with other settings: 'train'" in refused(other, tmp_path / "run", resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    assert "is not empty and holds no run" in refused(recipe, tmp_path / "mine")
    (tmp_path / "run/manifest.json").write_text("{}")
    assert "is not a manifest" in refused(recipe, tmp_path / "run", resume=True)


def test_resuming_with_another_plugin_version_is_refused_unless_asked_for(
    checkpoint: Path, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftwork.plugins import Plugins

    recipe = tiny_recipe(checkpoint, stream, adapter=LORA, train={"max_steps": 1})
    old = {"thing": {"distribution": "graftwork-thing", "version": "1.0"}}
    monkeypatch.setattr(Plugins, "versions", lambda self: old)
    run_tiny(recipe, tmp_path / "run")
    new = {"thing": {"distribution": "graftwork-thing", "version": "2.0"}}
    monkeypatch.setattr(Plugins, "versions", lambda self: new)
    assert "written with plugin 'thing' 1.0, installed is 2.0" in refused(
        recipe, tmp_path / "run", resume=True
    )
    run_tiny(recipe, tmp_path / "run", resume=True, allow_other_versions=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"learning_rat": 1}}, "train.learning_rat: SFTConfig has no field"),
        ({"train": {"max_steps": "many"}}, "train.max_steps = 'many'"),
        ({"train": {"output_dir": "x"}}, "train.output_dir is decided by"),
        ({"adapter": {"peft_type": "LORRA"}}, "did you mean 'LORA'?"),
        ({"adapter": {"peft_type": "LORA", "rank": 2}}, "adapter.rank: LoraConfig has no field"),
        ({"adapter": {**LORA, "policy": "sharred"}}, "adapter.policy = 'sharred'"),
        ({"plugins": {"nothing-like-it": {}}}, "plugin 'nothing-like-it' is not installed"),
        ({"data_options": {"order": ["fruit", "fruut"]}}, "'fruut'"),
        ({"algorithm": "dpo"}, "chosen"),
    ],
)
def test_refusals_before_anything_is_written(
    changes: dict, said: str, checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    if "algorithm" in changes:
        changes = {**changes, "train": {"precompute_ref_log_probs": True}}
    message = refused(tiny_recipe(checkpoint, stream, **changes), tmp_path / "run")
    assert said in message
    if "algorithm" not in changes:
        assert not (tmp_path / "run").exists()


def test_a_run_that_stopped_inside_a_task_keeps_its_whole_record(
    checkpoint: Path, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftwork.train.progress import Progress

    train = {"save_strategy": "steps", "save_steps": 2}
    recipe = tiny_recipe(checkpoint, stream, adapter=LORA, train=train)
    whole = run_tiny(recipe, tmp_path / "a")
    count = iter(range(100))
    original = Progress.on_step_end

    def stop(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if next(count) in (2, 6):  # in the first task, then in the resumed second one
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "on_step_end", stop)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run_tiny(recipe, tmp_path / "b", resume=resume)
    again = run_tiny(recipe, tmp_path / "b", resume=True)
    # TRL counts tokens from the resumed step on.
    records = [
        [{k: v for k, v in json.loads(line).items() if k != "num_tokens"} for line in path.open()]
        for path in (tmp_path / "a/metrics.jsonl", tmp_path / "b/metrics.jsonl")
    ]
    assert records[0] == records[1]
    assert again["scores"] == whole["scores"]


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    for task in ("one", "two"):
        (tmp_path / "data" / task).mkdir(parents=True)
        rows = [{"prompt": f"say {i}:", "chosen": f" {task} {i}", "rejected": " no"} for i in range(16)]
        (tmp_path / "data" / task / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data"


def test_preferences_in_a_stream_leave_no_reference_behind(
    checkpoint: Path, preferences: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(checkpoint, preferences, adapter=LORA, algorithm="dpo", train={"max_steps": 2})
    run_tiny(recipe, tmp_path / "run")
    assert {task for task, _, _ in losses(tmp_path / "run")} == {"one", "two"}
    assert not list((tmp_path / "run").rglob("ref"))
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()


def test_preferences_with_stacked_adapters_are_refused(
    checkpoint: Path, preferences: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(checkpoint, preferences, adapter={**LORA, "policy": "stacked"}, algorithm="dpo")
    assert "train with an adapter of the policy 'shared'" in refused(recipe, tmp_path / "run")


def test_items_that_do_not_fit_are_told(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = [{"prompt": "x" * (900 if i == 0 else 10), "completion": " y"} for i in range(8)]
    (tmp_path / "data/long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train = {"max_steps": 1, "max_length": 100}
    result = run_tiny(tiny_recipe(checkpoint, tmp_path / "data", adapter=LORA, train=train), tmp_path / "run")
    assert any("long: 1 of 8 training items are left out" in note for note in result["notes"])
    train["max_length"] = 5
    recipe = tiny_recipe(checkpoint, tmp_path / "data", adapter=LORA, train=train)
    assert "has no training item whose prompt is shorter" in refused(recipe, tmp_path / "none")


@pytest.mark.parametrize("stop", ["first stage", "second task", "end"])
def test_notes_about_the_data_survive_a_resumed_run(stop: str, checkpoint: Path, tmp_path: Path) -> None:
    """Those of reading (an item in both files) and those of training (an item that does not fit), each once."""
    for name, long in (("one", 1), ("two", 2)):
        (tmp_path / "data" / name).mkdir(parents=True)
        rows = [
            {"prompt": f"{name}{i}" + "x" * (900 if i < long else 10), "completion": " y"} for i in range(8)
        ]
        for part, chosen in (("train", rows), ("test", rows[-1:])):
            (tmp_path / f"data/{name}/{part}.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    train = {"max_steps": 2, "max_length": 100, "save_strategy": "steps", "save_steps": 1}
    recipe = tiny_recipe(checkpoint, tmp_path / "data", adapter=LORA, train=train)
    whole = run_tiny(recipe, tmp_path / "whole")
    for name, long in (("one", 1), ("two", 2)):
        assert sum(f"{name}: {long} of 8 training items" in note for note in whole["notes"]) == 1
        assert sum(f"{name}: 1 test items also stand" in note for note in whole["notes"]) == 1
    cut = {"first stage": "_learn", "second task": "_write_stage", "end": "_finish"}[stop]
    original = getattr(Stream, cut)

    def interrupt(self: Any, *args: Any) -> Any:
        if cut == "_finish" or args[0].index == 1:
            raise KeyboardInterrupt
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, cut, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_tiny(recipe, tmp_path / "cut")
    assert run_tiny(recipe, tmp_path / "cut", resume=True)["notes"] == whole["notes"]


def test_the_tiny_model_and_tasks_need_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    recipe = tiny_recipe("tiny-random", "tiny", adapter=LORA, train={"max_steps": 1})
    assert run_tiny(recipe, tmp_path / "a")["order"] == ["colour", "fruit", "metal"]
    made = sorted((tmp_path / "cache").iterdir())
    stamps = [path.stat().st_mtime_ns for path in made]
    run_tiny(recipe, tmp_path / "b")
    assert [path.stat().st_mtime_ns for path in made] == stamps
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
