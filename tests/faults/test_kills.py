"""A run that was killed goes on as if nothing had happened: same losses, same bytes, nothing left over."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graftwork.testing.faults import Harness, main, read_workloads, table
from graftwork.testing.processes import Started, Warm
from graftwork.testing.same import differences

HERE = Path(__file__).parent
WORKLOADS = HERE / "workloads.yaml"


@pytest.mark.parametrize(("name", "kills"), [("lora", 1), ("tpaw", 1), ("generate", 2), ("gptq", 2)])
def test_kills_at_random_moments(server: Warm, tmp_path: Path, name: str, kills: int) -> None:
    """A sample; ``python -m graftwork.testing.faults tests/faults/workloads.yaml`` tries as many as asked for."""
    harness = Harness(read_workloads(WORKLOADS, [name]), tmp_path, seed=3, starter=server, here=HERE)
    found = list(harness.kills(kills))
    assert len(found) == kills
    assert all(kill.survived for kill in found), table(found)


@pytest.mark.slow
def test_forty_kills_of_processes_that_start_like_any_other(capsys: pytest.CaptureFixture[str]) -> None:
    code = main([str(WORKLOADS), "--kills", "40", "--seed", "0"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert printed.rstrip().endswith("kills survived/tried: 40/40")


def test_a_kill_that_was_not_survived_is_told(
    server: Warm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(self: Harness, workload: Any) -> list[str]:
        answers = tmp_path / "generate/now/output/answers.jsonl"
        answers.write_bytes(answers.read_bytes()[:-1])
        (tmp_path / "generate/now/output/.x-01234567.part").touch()
        return compared(self, workload)

    compared = Harness._compared
    monkeypatch.setattr(Harness, "_compared", torn)
    harness = Harness(read_workloads(WORKLOADS, ["generate"]), tmp_path, seed=0, starter=server, here=HERE)
    (kill,) = harness.kills(1)
    assert not kill.survived
    assert kill.different == ["'.x-01234567.part' is left over", "'answers.jsonl' differs"]
    assert "kills survived/tried: 0/1" in table([kill])


def test_numbers_that_differ_are_found(tmp_path: Path) -> None:
    for name, metric in (("one", 0.5), ("two", 0.25)):
        (tmp_path / name).mkdir()
        result = {"metrics": {"perplexity": [1.0, metric]}, "train_seconds": metric}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    assert differences(tmp_path / "one", tmp_path / "two") == [
        "'result.json' differs at .metrics.perplexity[1]"
    ]


# ---------------------------------------------------------------------- moments that a draw seldom hits


def _kill_when(process: Started, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.said()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("name", ["lora", "sparta"])
def test_killed_right_after_the_last_step(commands: Any, name: str) -> None:
    """The Trainer would take one step more; without it, a plugin sees no batch any more."""
    process = commands.start(name)
    _kill_when(process, (commands.output / "run/stages/current/checkpoint-6/graftwork.json").exists)
    assert not (commands.output / "run/stages/01-colour").exists()
    assert "resuming colour at step 6" in commands.resumed(name).said()


def test_killed_while_a_checkpoint_was_written(commands: Any) -> None:
    """No marker, a file cut short, half a line in the record."""
    process = commands.start("sparta")
    current = commands.output / "run/stages/current"
    _kill_when(process, (current / "checkpoint-4/graftwork.json").exists)
    (current / "checkpoint-4/graftwork.json").unlink()
    torn = current / "checkpoint-4/adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    record = commands.output / "run/metrics.jsonl"
    record.write_text(record.read_text()[:-20])
    assert "resuming colour at step 2" in commands.resumed("sparta").said()


@pytest.mark.parametrize("name", ["lora", "gptq"])
def test_killed_between_two_files_of_the_end(commands: Any, name: str) -> None:
    """The result stands, and all that comes after it is still to do."""
    shutil.copytree(commands.whole(name), commands.output)
    run = commands.output / "run"
    (run / "results.json").unlink()
    (run / "report.html").unlink()
    (run / ".report.html-0123abcd.part").write_text("<html>")
    if name == "gptq":
        (run / "work").mkdir()
        (run / "work/progress.json").write_text("{}")
    commands.resumed(name)


def _first_task_alone(commands: Any) -> Path:
    """Leave of the two tasks what there is when the first one is over."""
    shutil.copytree(commands.whole("sparta"), commands.output)
    run = commands.output / "run"
    for name in ("stages/02-fruit", "adapter"):
        shutil.rmtree(run / name)
    for name in ("result.json", "results.json", "report.html"):
        (run / name).unlink()
    return run


def test_killed_between_two_tasks(commands: Any) -> None:
    _first_task_alone(commands)
    assert "resuming after task colour (1 of 2 done)" in commands.resumed("sparta").said()


def test_killed_after_a_stage_was_written_and_before_its_checkpoints_were_removed(commands: Any) -> None:
    """The next task must not take the finished one's last checkpoint for its own."""
    checkpoint = _first_task_alone(commands) / "stages/current/checkpoint-6"
    checkpoint.mkdir(parents=True)
    (checkpoint / "graftwork.json").write_text(json.dumps({"task": "colour", "step": 6, "events": 0}))
    commands.resumed("sparta")


def test_killed_after_the_model_and_before_the_result(commands: Any) -> None:
    shutil.copytree(commands.whole("lora"), commands.output)
    (commands.output / "run/result.json").unlink()
    (commands.output / "run/.result.json-0123abcd.part").write_text("{")
    (commands.output / "run/stages/current/checkpoint-6").mkdir(parents=True)
    (commands.output / "run/stages/current/README.md").touch()
    commands.resumed("lora")


@pytest.mark.parametrize("name", ["lora", "gptq"])
def test_killed_before_there_was_a_manifest(commands: Any, name: str) -> None:
    run = commands.output / "run"
    run.mkdir(parents=True)
    (run / ".lock").touch()
    (run / ".manifest.json-0123abcd.part").write_text("{")
    commands.resumed(name)


def test_killed_before_the_first_checkpoint(commands: Any) -> None:
    """What a kill leaves that early: a manifest, a lock, a beginning of the record."""
    whole, run = commands.whole("lora"), commands.output / "run"
    run.mkdir(parents=True)
    shutil.copy(whole / "run/manifest.json", run)
    (run / ".lock").touch()
    lines = (whole / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:7])
    commands.resumed("lora")


def test_killed_while_a_line_was_written(commands: Any) -> None:
    whole = commands.whole("generate")
    commands.output.mkdir()
    shutil.copy(whole / "answers.jsonl.settings.json", commands.output)
    lines = (whole / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (commands.output / "answers.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:9])
    commands.resumed("generate")
    again = commands.resumed("generate")
    assert "all 24 answers are in" in again.said()


def test_a_round_that_stands_is_tidied_up(commands: Any) -> None:
    """Killed between the table of a round's answers and the removal of its parts."""
    shutil.copytree(commands.whole("tpaw"), commands.output)
    run = commands.output / "run"
    (run / "result.json").unlink()
    shutil.rmtree(run / "stages/02-iteration-2")
    (run / "rounds/iteration-1/written").mkdir()
    (run / "rounds/iteration-1/written/00000.json").write_text("[]")
    (run / "rounds/iteration-2/pairs.parquet").unlink()
    for known in (run / "rounds/log-probs").glob("*/*.safetensors"):
        known.with_suffix(".parts").mkdir()
    commands.resumed("tpaw")
