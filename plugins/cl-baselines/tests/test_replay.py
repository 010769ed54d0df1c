"""Replay: what is drawn, what is kept, and that old items are really trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from graftwork import UserError
from graftwork.testing.runs import losses, run_tiny, tiny_recipe
from graftwork.train import stream as streams
from graftwork_cl_baselines.replay import Replay, ReplayOptions, draw

LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}
RUN = SimpleNamespace(seed=7)


def rows(name: str, count: int) -> Dataset:
    return Dataset.from_list([{"prompt": f"{name} {i}", "completion": " é"} for i in range(count)])


def task(index: int) -> Any:
    return SimpleNamespace(index=index, name=f"t{index}")


def recipe_of(checkpoint: Path, stream: Path, share: float = 0.25, **settings: Any) -> Any:
    settings = {"train": {"max_steps": 3}, "evaluate": {"cells": "final"}, "adapter": LORA, **settings}
    return tiny_recipe(checkpoint, stream, plugins={"replay": {"share": share}}, seed=1, **settings)


@pytest.mark.parametrize(
    ("share", "count", "expected"),
    [(0.1, 100, 10), (0.1, 101, 11), (0.1, 1, 1), (1.0, 9, 9), (0.25, 16, 4), (0.1, 30, 3), (1e-9, 50, 1)],
)
def test_how_many_are_drawn(share: float, count: int, expected: int) -> None:
    items = draw(rows("a", count), share, seed=1)
    assert len(items) == expected
    assert len({item["prompt"] for item in items}) == expected


def test_drawing_depends_on_the_seed_alone() -> None:
    data = rows("a", 50)
    first = draw(data, 0.2, seed=1)
    torch.rand(5)
    assert draw(data, 0.2, seed=1) == first
    assert draw(data, 0.2, seed=2) != first
    assert first != data.to_list()[:10]
    assert all(item in data.to_list() for item in first)


def test_the_buffer_grows_after_a_task_and_not_before() -> None:
    replay = Replay(ReplayOptions(share=0.5))
    assert replay.training_data(RUN, task(0), rows("a", 4)) is None
    assert replay.buffer == []
    replay.task_end(RUN, task(0), None)
    kept = list(replay.buffer)
    assert kept == draw(rows("a", 4), 0.5, seed=7)
    mixed = replay.training_data(RUN, task(1), rows("b", 6))
    assert mixed.to_list() == rows("b", 6).to_list() + kept
    replay.task_end(RUN, task(1), None)
    # Only the task's own items are drawn from, never what was replayed.
    assert replay.buffer == kept + draw(rows("b", 6), 0.5, seed=8)
    third = replay.training_data(RUN, task(2), rows("c", 2))
    assert [row["prompt"][0] for row in third] == list("ccaabbb")


def test_the_state_makes_the_round_trip() -> None:
    replay, again = Replay(ReplayOptions()), Replay(ReplayOptions())
    replay.buffer = [{"prompt": "Straße\n\u2028", "completion": " 漢字", "label": None, "n": 3}]
    state = replay.save_state(RUN)
    assert {key: value.dtype for key, value in state.items()} == {"buffer": torch.uint8}
    again.load_state(RUN, state)
    assert again.buffer == replay.buffer
    again.load_state(RUN, {})
    assert again.buffer == replay.buffer
    empty = Replay(ReplayOptions())
    empty.load_state(RUN, Replay(ReplayOptions()).save_state(RUN))
    assert empty.buffer == []


def test_chat_items_keep_their_form() -> None:
    chat = Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]}
            for i in range(4)
        ]
    )
    replay = Replay(ReplayOptions(share=0.5))
    replay.training_data(RUN, task(0), chat)
    replay.task_end(RUN, task(0), None)
    again = Replay(ReplayOptions(share=0.5))
    again.load_state(RUN, replay.save_state(RUN))
    mixed = again.training_data(RUN, task(1), chat)
    assert mixed.features == chat.features
    assert mixed.to_list()[4:] == replay.buffer


def test_a_run_trains_on_old_items(
    checkpoint: Path, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second task's trainer gets its own 16 items and 4 of the first; the state counts as extra."""
    seen = []
    original = streams.compose

    def spy(trainer_class: type) -> type:
        class Watched(original(trainer_class)):
            def __init__(self, *args: Any, train_dataset: Dataset, **kwargs: Any) -> None:
                seen.append([row["prompt"] for row in train_dataset])
                super().__init__(*args, train_dataset=train_dataset, **kwargs)

        return Watched

    monkeypatch.setattr(streams, "compose", spy)
    result = run_tiny(recipe_of(checkpoint, stream, train={"max_steps": 1}), tmp_path / "run")
    assert [len(prompts) for prompts in seen] == [16, 20]
    assert all("Which fruit?" in prompt for prompt in seen[0])
    assert all("Which metal?" in prompt for prompt in seen[1][:16])
    assert set(seen[1][16:]) < set(seen[0])
    assert len(set(seen[1][16:])) == 4
    assert result["extra_state_bytes"] > 100


def test_replay_changes_the_second_task_only(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    run_tiny(recipe_of(checkpoint, stream), tmp_path / "with")
    plain = tiny_recipe(
        checkpoint, stream, seed=1, adapter=LORA, train={"max_steps": 3}, evaluate={"cells": "final"}
    )
    run_tiny(plain, tmp_path / "without")
    left, right = losses(tmp_path / "with"), losses(tmp_path / "without")
    assert left[:3] == right[:3]
    assert left[3:] != right[3:]


def test_a_resumed_run_equals_the_whole(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    recipe = recipe_of(checkpoint, stream)
    whole = run_tiny(recipe, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/result.json").unlink()
    shutil.rmtree(sorted((tmp_path / "b/stages").iterdir())[1])
    again = run_tiny(recipe, tmp_path / "b", resume=True)
    assert (tmp_path / "a/metrics.jsonl").read_text() == (tmp_path / "b/metrics.jsonl").read_text()
    assert again["scores"] == whole["scores"]
    for name in ("adapter/adapter_model.safetensors", "stages/02-metal/plugins/replay.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("options", [{"share": 0}, {"share": 1.5}, {"share": "much"}, {"part": 0.1}])
def test_bad_options_are_refused(options: dict, checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(checkpoint, stream, adapter=LORA, plugins={"replay": options})
    with pytest.raises(UserError, match=next(iter(options))) as caught:
        run_tiny(recipe, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
