"""A run that was killed goes on as if nothing had happened: same losses, same bytes."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.cli import main
from graftwork.run import lock_folder
from graftwork.testing.runs import kill_when, losses

STEPS = 12
SAVE_EVERY = 2
# A step in the middle of a task: after a checkpoint, and far enough from the end to be hit.
KILL_AT = random.Random(20).randrange(SAVE_EVERY + 1, STEPS - 3)
# Everything that draws random numbers or has state of its own is switched on.
ARMS = {
    "lora": [
        "adapter.peft_type=LORA",
        "adapter.r=2",
        "adapter.target_modules=all-linear",
        "adapter.lora_dropout=0.1",
    ],
    "sparta": [
        "plugins.sparta.block_layers=1",
        "plugins.sparta.rank_specific=4",
        "plugins.sparta.components=2",
        "plugins.sparta.dropout=0.1",
        "plugins.sparta.restore_every=3",
        "plugins.sparta.restore_probability=0.2",
        "plugins.sparta.shared_lr=0.5",
    ],
}
TRAIN = [
    f"train.max_steps={STEPS}",
    f"train.save_steps={SAVE_EVERY}",
    "train.save_strategy=steps",
    "train.learning_rate=1e-2",
    "train.per_device_train_batch_size=4",
    "train.gradient_accumulation_steps=2",
    "train.logging_steps=1",
    "evaluate.cells=seen",
    "evaluate.max_new_tokens=2",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The killed processes have one thread; sums in this one must not be split otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def words(checkpoint: Path, stream: Path) -> Callable[[str, Path], list[str]]:
    def command(arm: str, output: Path) -> list[str]:
        chosen = ["train", "--model", str(checkpoint), "--data", str(stream), "--output", str(output)]
        chosen += ["--plugin", arm] if arm == "sparta" else []
        return chosen + [word for setting in (*TRAIN, *ARMS[arm]) for word in ("--set", setting)]

    return command


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the uninterrupted runs lie, one per arm, once they are made."""
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def whole(
    finished: Path, trainer: Callable[..., Any], words: Callable[[str, Path], list[str]]
) -> Callable[[str], Path]:
    def make(arm: str) -> Path:
        if not (finished / arm).exists():
            outcome = trainer(*words(arm, finished / arm))
            assert outcome.code == 0, outcome.err
        return finished / arm

    return make


def _logged(root: Path, task: str, step: int) -> bool:
    try:
        return any(name == task and at >= step for name, at, _ in losses(root))
    except (OSError, ValueError):
        return False  # not there yet, or its last line is being written


def _record(root: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    # TRL counts tokens from zero again when it resumes.
    return [{key: value for key, value in event.items() if key != "num_tokens"} for event in events]


def _assert_same(whole: Path, resumed: Path) -> None:
    assert losses(resumed) == losses(whole)
    assert len(losses(whole)) == 2 * STEPS
    assert _record(resumed) == _record(whole)
    before, after = (json.loads((root / "result.json").read_text()) for root in (whole, resumed))
    assert after["scores"] == before["scores"]
    weights = sorted((whole / "adapter").rglob("*.safetensors"))
    assert weights
    for file in weights:
        assert (resumed / file.relative_to(whole)).read_bytes() == file.read_bytes()


def _checkpoints(root: Path) -> list[Path]:
    found = (root / "stages/current").glob("checkpoint-*")
    return sorted(found, key=lambda folder: int(folder.name.partition("-")[2]))


@pytest.fixture
def resumes(
    trainer: Callable[..., Any], words: Callable[[str, Path], list[str]], whole: Callable[[str], Path]
) -> Callable[..., None]:
    """Resume a run, check that it said ``saying`` and that it came to what the uninterrupted one did."""

    def check(arm: str, root: Path, saying: str = "") -> None:
        outcome = trainer(*words(arm, root), "--resume")
        assert outcome.code == 0, outcome.err
        assert saying in outcome.err
        _assert_same(whole(arm), root)

    return check


@pytest.mark.parametrize("arm", ARMS)
def test_killed_in_the_middle_of_a_task(
    arm: str, resumes: Callable[..., None], words: Callable[[str, Path], list[str]], tmp_path: Path
) -> None:
    root, half_saved = tmp_path / "run", tmp_path / "half"
    kill_when(words(arm, root), lambda: _logged(root, "fruit", KILL_AT))
    assert not (root / "result.json").exists()
    assert len(losses(root)) < 2 * STEPS
    assert _checkpoints(root)
    shutil.copytree(root, half_saved)
    resumes(arm, root, "resuming fruit at step")
    if arm == "lora":
        return  # the plugin's checkpoints hold everything that a plain one does

    # The same kill, while the newest checkpoint was being written: no marker, a file and a line cut short.
    newest = _checkpoints(half_saved)[-1]
    (newest / "graftwork.json").unlink(missing_ok=True)
    torn = newest / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    record = half_saved / "metrics.jsonl"
    record.write_text(record.read_text()[:-20])
    resumes(arm, half_saved)


def test_killed_between_two_tasks(
    resumes: Callable[..., None], words: Callable[[str, Path], list[str]], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    kill_when(words("sparta", root), (root / "stages/01-colour/stage.json").exists)
    assert {task for task, _, _ in losses(root)} == {"colour"}
    resumes("sparta", root, "resuming after task colour (1 of 2 done)")


def test_killed_after_a_stage_was_written_and_before_its_checkpoints_were_removed(
    resumes: Callable[..., None],
    words: Callable[[str, Path], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next task must not take the finished one's last checkpoint for its own."""
    root, remove = tmp_path / "run", shutil.rmtree

    def stopped(path: Any, *args: Any, **options: Any) -> None:
        if Path(path) == root / "stages/current":
            raise KeyboardInterrupt
        remove(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stopped)
        with pytest.raises(SystemExit) as caught:
            main(words("lora", root))
    assert caught.value.code == 130
    assert (root / "stages/01-colour/stage.json").exists()
    assert _checkpoints(root)
    resumes("lora", root)


def test_killed_before_the_first_checkpoint(
    resumes: Callable[..., None], whole: Callable[[str], Path], tmp_path: Path
) -> None:
    """What a kill leaves that early: a manifest, a lock, a beginning of the record."""
    root = tmp_path / "run"
    root.mkdir()
    shutil.copy(whole("lora") / "manifest.json", root)
    (root / ".lock").touch()
    lines = (whole("lora") / "metrics.jsonl").read_text().splitlines(keepends=True)
    (root / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:7])
    resumes("lora", root)


def test_two_processes_cannot_write_one_run(
    trainer: Callable[..., Any], words: Callable[[str, Path], list[str]], tmp_path: Path
) -> None:
    with lock_folder(tmp_path / "run"):
        outcome = trainer(*words("lora", tmp_path / "run"))
    assert outcome.code == 2
    assert "is in use by another process" in outcome.err
    assert not (tmp_path / "run/manifest.json").exists()
