"""The comparison of one process with two finds what differs, and nothing else."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.testing import distributed
from graftwork.testing.distributed import Job, compared, two_processes
from graftwork.testing.packages import install_plugin
from safetensors.torch import save_file

STEPS = [
    {"task": "a", "step": 1, "loss": 5.5, "grad_norm": 0.5, "loss/far": 3e-5, "reward/margin": 1e-5},
    {"task": "a", "step": 2, "loss": 5.0, "grad_norm": 0.4, "loss/far": 2e-5, "reward/margin": 0.2},
]


def a_run(folder: Path, steps: list[dict[str, Any]] = STEPS, weight: float = 1.0, score: float = 0.5) -> Path:
    """Write what a run leaves, as far as it is compared."""
    (folder / "adapter").mkdir(parents=True)
    lines = [{"event": "log", "entropy": torch.rand(1).item(), **step} for step in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "result.json").write_text(json.dumps({"scores": [[score]]}))
    save_file({"w": torch.tensor([weight, 2.0])}, folder / "adapter/adapter_model.safetensors")
    return folder


def with_first(**changes: float) -> dict[str, Any]:
    return {"steps": [{**STEPS[0], **changes}, STEPS[1]]}


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return a_run(tmp_path / "one")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        with_first(loss=5.5 * (1 + 8e-6)),
        with_first(grad_norm=0.5 * (1 + 8e-5)),
        # Differences of sums of log-probabilities that are rounded to 1e-6 each.
        with_first(**{"reward/margin": 1.5e-5}),
        {"weight": 1 + 8e-4},
    ],
)
def test_rounding_is_no_difference(changes: dict[str, Any], one: Path, tmp_path: Path) -> None:
    found = compared(Job("j", []), one, a_run(tmp_path / "two", **changes))
    assert found.steps == 2
    # What is close to zero has no relative difference.
    assert set(found.largest) == {"loss", "grad_norm", "reward/margin"}
    assert max(found.largest.values()) < 1e-4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            with_first(loss=5.5 * (1 + 2e-5)),
            r"j: 1 figures differ, first loss at a step 1: 5\.5 in one process, 5\.5001",
        ),
        (with_first(grad_norm=0.5 * (1 + 2e-4)), "grad_norm at a step 1"),
        # Small as it is, it is no rounding.
        (with_first(**{"loss/far": 3.1e-5}), "loss/far at a step 1"),
        (with_first(**{"reward/margin": 3e-5}), "reward/margin at a step 1"),
        (with_first(loss=float("nan")), "loss at a step 1"),
        (with_first(step=3), "j: other steps"),
        ({"steps": STEPS[:1]}, "j: other steps"),
        (
            {"steps": [{k: v for k, v in step.items() if k != "loss/far"} for step in STEPS]},
            "'loss/far' is logged by",
        ),
        ({"weight": 1.01}, "j, adapter/w: "),
        ({"score": 0.25}, "j: scores"),
    ],
)
def test_a_difference_is_told(changes: dict[str, Any], said: str, one: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=said):
        compared(Job("j", []), one, a_run(tmp_path / "two", **changes))


def test_a_wider_tolerance_is_for_the_figure_that_it_names(one: Path, tmp_path: Path) -> None:
    other = a_run(tmp_path / "two", **with_first(**{"loss/far": 3.02e-5}))
    assert compared(Job("j", [], tolerance={"loss/far": 1e-2}), one, other).largest["loss/far"] > 6e-3
    with pytest.raises(AssertionError, match="loss/far"):
        compared(Job("j", [], tolerance={"loss": 1e-2}), one, other)


def test_a_run_without_steps_or_weights_compares_nothing(tmp_path: Path) -> None:
    empty = [a_run(tmp_path / name, steps=[]) for name in ("a", "b")]
    with pytest.raises(AssertionError, match="j: no step was logged"):
        compared(Job("j", []), *empty)
    bare = [a_run(tmp_path / name) for name in ("c", "d")]
    for root in bare:
        (root / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(AssertionError, match="j: the run left no weights"):
        compared(Job("j", []), *bare)


def test_the_batch_is_dealt_out() -> None:
    job = Job("j", ["train", "--model", "m"], 4, ["train.fsdp=true"])
    one, two = (" ".join(job.command(Path("out"), count)) for count in (1, 2))
    assert "per_device_train_batch_size=4" in one
    assert "fsdp" not in one
    assert "per_device_train_batch_size=2" in two
    assert "--set train.fsdp=true" in two
    with pytest.raises(ValueError, match="job 'j': a batch of 4 cannot be dealt to 3"):
        job.command(Path("out"), 3)


def test_a_launch_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the processes that it started."""
    late = tmp_path / "late"
    child = f"import time; time.sleep(3); open({str(late)!r}, 'w')"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    assert distributed._launched([sys.executable, "-c", code], 1, {}) == (distributed.LATE, "begun\n", "")
    time.sleep(3)
    assert not late.exists()


TERM = """
from graftwork import LossTerm, hookimpl
from graftwork.distributed import mean_over_ranks

class Length:
    def __init__(self, options): ...

    @hookimpl
    def loss_terms(self, run, model):
        return [LossTerm("length", self.term)]

    def term(self, model, batch):
        weights = model.get_output_embeddings().weight
        rows = weights[batch["labels"][batch["labels"] != -100]].square().sum(-1)
        return MEAN
"""


@pytest.mark.slow
def test_a_mean_of_means_is_found_and_a_mean_over_ranks_is_none(
    checkpoint: Path, stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for name, mean in (("naive", "rows.mean()"), ("right", "mean_over_ranks(rows.sum(), len(rows))")):
        install_plugin(site, name, f"of{name}:Length", TERM.replace("MEAN", mean))
    monkeypatch.setenv("PYTHONPATH", str(site))
    settings = (
        "train.max_steps=2",
        "train.save_strategy=no",
        "evaluate.max_new_tokens=2",
        "data.order=[fruit,colour]",
    )
    words = ["train", "--model", str(checkpoint), "--data", str(stream)]
    words += [word for setting in settings for word in ("--set", setting)]
    found = two_processes([*words, "--plugin", "right"], tmp_path / "right")
    assert found.steps == 4
    assert found.largest["loss/length"] < 1e-5
    with pytest.raises(AssertionError, match=r"job: \d+ figures differ, first .*loss/length at fruit step 1"):
        two_processes([*words, "--plugin", "naive"], tmp_path / "naive")
    with pytest.raises(
        AssertionError, match=r"job failed in one process: (?s:.*)plugin 'nobody' is not installed"
    ):
        two_processes([*words, "--plugin", "nobody"], tmp_path / "nobody")
