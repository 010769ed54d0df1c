"""Multi-task: the same items and steps as the stream, mixed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from graftwork import UserError
from graftwork.data.tasks import Task
from graftwork.testing.runs import run_tiny, tiny_recipe
from graftwork_cl_baselines.mtl import Mtl, MtlOptions, mixed
from hypothesis import given, settings
from hypothesis import strategies as st

LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}


def rows(name: str, count: int) -> Dataset:
    return Dataset.from_list([{"prompt": f"{name} {i}", "completion": "x"} for i in range(count)])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 1000))
def test_every_item_comes_once_and_slices_keep_their_length(lengths: list[int], seed: int) -> None:
    parts = [rows(str(number), length) for number, length in enumerate(lengths)]
    slices = mixed(parts, seed)
    assert [len(part) for part in slices] == lengths
    before = sorted(row["prompt"] for part in parts for row in part)
    assert sorted(row["prompt"] for part in slices for row in part) == before
    assert [part.to_list() for part in mixed(parts, seed)] == [part.to_list() for part in slices]


def test_slices_are_mixtures_and_depend_on_the_seed() -> None:
    parts = [rows("a", 40), rows("b", 40)]
    first = mixed(parts, 1)
    for part in first:
        assert {row["prompt"][0] for row in part} == {"a", "b"}
    assert mixed(parts, 2)[0].to_list() != first[0].to_list()


def test_a_task_keeps_all_but_its_training_items() -> None:
    tasks = [Task(n, rows(n, 3), test=rows(n, 2), labels=["x"], index=i, total=2) for i, n in enumerate("ab")]
    given_items = [task.train for task in tasks]

    class Run:
        seed = 3

    made = Mtl(MtlOptions()).task_stream(Run, tasks)
    assert [(task.name, task.index, task.total, task.labels) for task in made] == [
        ("a", 0, 2, ["x"]),
        ("b", 1, 2, ["x"]),
    ]
    assert all(new.test is old.test for new, old in zip(made, tasks, strict=True))
    assert [task.train for task in tasks] == given_items


def test_tasks_of_different_columns_are_refused() -> None:
    chat = Dataset.from_list([{"messages": [{"role": "user", "content": "q"}]}])

    class Run:
        seed = 0

    with pytest.raises(UserError, match="'a' and 'c' have different columns") as caught:
        Mtl(MtlOptions()).task_stream(
            Run, [Task("a", rows("a", 2)), Task("b", rows("b", 2)), Task("c", chat)]
        )
    assert "\n" not in str(caught.value)


def test_a_run_takes_the_steps_of_the_stream_and_resumes(
    checkpoint: Path, stream: Path, resumes_exactly: Callable[..., Path], logged: Callable[..., Any]
) -> None:
    train = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 2}
    settings = {"train": train, "evaluate": {"cells": "final"}, "adapter": LORA, "seed": 1}
    whole = resumes_exactly(tiny_recipe(checkpoint, stream, plugins={"mtl": {}}, **settings), None)
    run_tiny(tiny_recipe(checkpoint, stream, **settings), whole.parent / "plain")
    both = [logged(whole), logged(whole.parent / "plain")]
    steps = [[(log["task"], log["step"]) for log in logs] for logs in both]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 8
    assert both[0][0]["loss"] != both[1][0]["loss"]


def test_options_are_refused(checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="share"):
        run_tiny(tiny_recipe(checkpoint, stream, plugins={"mtl": {"share": 1}}), tmp_path / "run")
