"""A run that was stopped, wherever, goes on to the same bytes; two processes measure what one does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.testing.data import tiny_stream
from graftwork.testing.models import tiny_checkpoint
from graftwork.testing.runs import call_trainer, kill_when, losses, run_tiny, tiny_recipe
from graftwork_parsp import stream as stream_module
from safetensors.torch import load_file

# Everything that has state or draws is on.
ARMS = {
    "adapter": {"density": 0.25, "form": "lora", "rank": 3, "rows": "random", "down": "columns"},
    "sketch": {"density": 0.25, "eps": 0.05, "moments": "sketch", "sketch": 8, "moment_items": 2},
    "gradient": {"density": 0.25, "mode": "gradient"},
}
TRAIN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums must not be split otherwise than in the processes that are killed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe_of(checkpoint: Path, stream: Path, arm: str) -> Any:
    return tiny_recipe(
        checkpoint,
        stream,
        plugins={"parsp": ARMS[arm]},
        seed=1,
        train=TRAIN,
        evaluate={"cells": "final", "max_new_tokens": 2},
    )


@pytest.fixture(scope="module")
def whole(checkpoint: Path, stream: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``whole(arm)`` is the directory of that arm's uninterrupted run."""
    made: dict[str, Path] = {}

    def call(arm: str) -> Path:
        if arm not in made:
            made[arm] = tmp_path_factory.mktemp("whole") / arm
            torch.set_num_threads(1)
            run_tiny(recipe_of(checkpoint, stream, arm), made[arm])
        return made[arm]

    return call


def record(root: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    # TRL counts tokens from zero again when it resumes.
    return [{key: value for key, value in event.items() if key != "num_tokens"} for event in events]


def assert_same(whole: Path, resumed: Path) -> None:
    assert record(resumed) == record(whole)
    files = [file for file in whole.rglob("*.safetensors") if "current" not in file.parts]
    assert len(files) >= 5
    for file in files:
        assert (resumed / file.relative_to(whole)).read_bytes() == file.read_bytes(), file
    before, after = (json.loads((root / "result.json").read_text()) for root in (whole, resumed))
    assert after["charts"] == before["charts"]
    assert after["scores"] == before["scores"]


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("where", ["relevance", "training", "moments"])
@pytest.mark.parametrize("task", [pytest.param("fruit", marks=pytest.mark.slow), "metal"])
def test_stopped_anywhere(
    arm: str, where: str, task: str, whole: Callable[[str], Path], checkpoint: Path, stream: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In the relevance pass, after the checkpoint at step 2, in the pass for the moments."""
    target, name = {
        "relevance": (stream_module, "relevance"),
        "training": (stream_module.Stream, "end"),
        "moments": (stream_module, "collect"),
    }[where]
    original, calls = getattr(target, name), []

    def stop(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == ["fruit", "metal"].index(task) + 1:
            raise Stopped
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, stop)
        with pytest.raises(Stopped):
            run_tiny(recipe_of(checkpoint, stream, arm), tmp_path / "run")
    if where == "training":
        # The checkpoint of the last step is lost too, so that training goes on from the middle.
        (tmp_path / "run/stages/current/checkpoint-4/graftwork.json").unlink()
    run_tiny(recipe_of(checkpoint, stream, arm), tmp_path / "run", resume=True)
    assert_same(whole(arm), tmp_path / "run")


@pytest.mark.parametrize("arm", ["adapter", "sketch"])
def test_resumed_between_tasks(
    arm: str, whole: Callable[[str], Path], checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole(arm), tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    shutil.rmtree(sorted((tmp_path / "run/stages").iterdir())[1])
    run_tiny(recipe_of(checkpoint, stream, arm), tmp_path / "run", resume=True)
    assert_same(whole(arm), tmp_path / "run")


def test_resumed_after_the_last_task_has_its_charts(
    whole: Callable[[str], Path], checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    """No task begins in the process that resumes, and the report still shows what each took."""
    shutil.copytree(whole("adapter"), tmp_path / "run")
    before = json.loads((tmp_path / "run/result.json").read_text())
    (tmp_path / "run/result.json").unlink()
    after = run_tiny(recipe_of(checkpoint, stream, "adapter"), tmp_path / "run", resume=True)
    assert [chart["title"] for chart in after["charts"]] == ["neurons", "input directions"]
    assert after["charts"] == before["charts"]


@pytest.mark.slow
def test_killed_in_a_task(checkpoint: Path, tmp_path: Path) -> None:
    """A real kill, in a process of its own."""
    stream = tiny_stream(tmp_path / "data", ["fruit", "metal"], train=16, test=2)
    settings = [
        "train.max_steps=16",
        "train.save_strategy=steps",
        "train.save_steps=2",
        "train.logging_steps=1",
    ]
    settings += ["train.per_device_train_batch_size=4", "train.learning_rate=1e-2", "evaluate.cells=final"]
    settings += ["evaluate.max_new_tokens=2", "plugins.parsp.density=0.25"]

    def words(output: Path) -> list[str]:
        start = ["train", "--model", str(checkpoint), "--data", str(stream), "--plugin", "parsp"]
        return [*start, "--output", str(output), *(w for s in settings for w in ("--set", s))]

    def reached() -> bool:
        try:
            return any(task == "metal" and step >= 5 for task, step, _ in losses(tmp_path / "killed"))
        except (OSError, ValueError):
            return False

    kill_when(words(tmp_path / "killed"), reached)
    assert len(losses(tmp_path / "killed")) < 32
    assert call_trainer([*words(tmp_path / "killed"), "--resume"]).returncode == 0
    assert call_trainer(words(tmp_path / "whole")).returncode == 0
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_another_base_is_refused(
    whole: Callable[[str], Path], checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    """The same folder with other weights in it."""
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    recipe = recipe_of(model, stream, "adapter")
    run_tiny(recipe, tmp_path / "run")
    (tmp_path / "run/result.json").unlink()
    shutil.rmtree(sorted((tmp_path / "run/stages").iterdir())[1])
    tiny_checkpoint(model, seed=1)
    with pytest.raises(UserError, match="statistics belong to another base model"):
        run_tiny(recipe, tmp_path / "run", resume=True)


def test_two_processes_measure_what_one_does(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    """Relevance, cores, moments and sketches of half the items each are those of all, and training too."""
    options = {"density": 0.25, "down": "columns", "moment_items": 7}
    train = {"max_steps": 2, "save_strategy": "no", "learning_rate": 1e-2, "adam_epsilon": 1e-5}
    evaluate = {"cells": "final", "max_new_tokens": 2}
    recipe = tiny_recipe(
        checkpoint, stream, plugins={"parsp": options}, train=train, evaluate=evaluate, seed=1
    )
    run_tiny(recipe, tmp_path / "one")
    settings = {
        "seed": 1,
        "train.logging_steps": 1,
        "train.per_device_train_batch_size": 2,
        **{f"plugins.parsp.{key}": value for key, value in options.items()},
        **{f"train.{key}": value for key, value in train.items()},
        **{f"evaluate.{key}": value for key, value in evaluate.items()},
    }
    words = ["train", "--model", str(checkpoint), "--data", str(stream), "--plugin", "parsp"]
    words += ["--output", str(tmp_path / "two")]
    words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = call_trainer(words, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two/manifest.json").read_text())["world_size"] == 2
    for stage in sorted((tmp_path / "one/stages").iterdir()):
        mine = load_file(stage / "plugins/parsp.safetensors")
        theirs = load_file(tmp_path / "two/stages" / stage.name / "plugins/parsp.safetensors")
        assert mine.keys() == theirs.keys()
        assert any(key.endswith("/rows") for key in mine)
        for key, value in mine.items():
            if key.endswith("/rows"):
                # A sketch is known up to a rotation.
                mine_moment, their_moment = value.T @ value, theirs[key].T @ theirs[key]
                torch.testing.assert_close(their_moment, mine_moment, rtol=1e-3, atol=1e-4)
            elif value.is_floating_point():
                torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-6, msg=key)
            else:
                assert torch.equal(theirs[key], value), key
    mine, theirs = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("one", "two"))
    for key, value in mine.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-2, atol=1e-4)
