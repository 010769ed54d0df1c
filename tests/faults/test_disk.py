"""A disk that is full, read-only or in use: one sentence, nothing half-written, and later on the same bytes."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from graftwork.testing.processes import Started, Warm
from graftwork.testing.same import differences, unfinished

SHORT = ["lora", "gptq", "generate"]
FILL = "graftwork.testing.full_disk:fill"
Told = Callable[[Started], str]


def _attempts(commands: Any, name: str) -> list[str]:
    # What is kept for later runs is there then.
    commands.whole(name)
    trace = commands.folder / "trace"
    given = {"below": str(commands.output), "at": 0, "trace": str(trace)}
    process = commands.run(name, before=FILL, given=given)
    assert process.poll() == 0, process.said()
    commands.clear()
    return trace.read_text().splitlines()


def _full_at(commands: Any, told: Told, name: str, number: int, what: str) -> None:
    trace = commands.folder / "trace"
    given = {"below": str(commands.output), "at": number, "trace": str(trace)}
    process = commands.run(name, before=FILL, given=given)
    said = told(process)
    assert "cannot be written: the disk is full; make room there" in said, (what, said)
    assert str(commands.output) in said, (what, said)
    assert unfinished(commands.output) == [], what
    assert (
        not (commands.output / "run/result.json").exists()
        or (commands.output / "run/model").exists()
        or (commands.output / "run/adapter").exists()
    )
    commands.resumed(name)
    commands.clear()


@pytest.mark.parametrize("name", SHORT)
def test_full_from_some_attempt_to_write_on(commands: Any, sentence: Told, name: str) -> None:
    attempts = _attempts(commands, name)
    assert len(attempts) > 4
    for number in random.Random(name).sample(range(1, len(attempts) + 1), 1):
        _full_at(commands, sentence, name, number, f"{number}: {attempts[number - 1]}")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_full_from_every_attempt_to_write_on(commands: Any, sentence: Told, name: str) -> None:
    for number, attempt in enumerate(_attempts(commands, name), 1):
        _full_at(commands, sentence, name, number, f"{number}: {attempt}")


# ---------------------------------------------------------------------- file systems of their own

APART = ["unshare", "--mount", "--map-root-user"]


@pytest.fixture
def mounted(cache: None, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Return what runs commands where a folder is a file system with the options given."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("unshare") is None or subprocess.run([*APART, "true"], check=False).returncode:
        pytest.skip("a file system of its own cannot be mounted here (unshare)")
    servers: list[Warm] = []

    def call(mount: str) -> tuple[Warm, Path, Path]:
        words = [*APART, "sh", "-c", f'{mount} \'{place}\' && exec "$0" "$@"']
        server = Warm(within=words)
        servers.append(server)
        return server, place, Path(f"/proc/{server.pid}/root{place}")

    yield call
    for server in servers:
        server.close()


def _more_room(server: Warm, place: Path, options: str) -> None:
    inside = ["nsenter", f"--target={server.pid}", "--user", "--mount", "--preserve-credentials"]
    subprocess.run([*inside, "mount", "-o", f"remount,{options}", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_small_file_system(
    commands: Any, sentence: Told, mounted: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    """Pages and names run out at places that are drawn; the libraries' own writers meet it, too."""
    server, place, seen = mounted("mount -t tmpfs tmpfs")
    whole = commands.whole(name)
    draw = random.Random(f"small {name}")
    size = sum(path.stat().st_blocks * 512 for path in whole.rglob("*"))
    names = sum(1 for _ in whole.rglob("*"))
    limits = [f"size={draw.randrange(4096, size, 4096)},nr_inodes=100k" for _ in range(6)]
    limits += [f"size=100m,nr_inodes={draw.randrange(2, names + 3)}" for _ in range(4)]
    words = commands.words(name, place / "output")
    undisturbed = None
    for limit in ["size=100m,nr_inodes=100k", *limits]:
        shutil.rmtree(seen / "output", ignore_errors=True)
        _more_room(server, place, limit)
        process = server.run(words, tmp_path / "log")
        if undisturbed is None:
            assert process.poll() == 0, process.said()
            undisturbed = tmp_path / "undisturbed"
            shutil.copytree(seen / "output", undisturbed)
            continue
        if process.poll() != 0:
            said = sentence(process)
            assert "the disk is full; make room there" in said or "free and the run may need" in said, said
            assert unfinished(seen) == [], limit
            _more_room(server, place, "size=100m,nr_inodes=100k")
            process = server.run([*words, "--resume"], tmp_path / "log")
            assert process.poll() == 0, process.said()
        assert differences(undisturbed, seen / "output") == [], limit


@pytest.mark.parametrize("name", SHORT)
def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_read(
    commands: Any, sentence: Told, name: str
) -> None:
    trace = commands.folder / "trace"
    given = {"below": str(commands.output), "at": 1, "trace": str(trace), "code": errno.EROFS}
    process = commands.run(name, before="graftwork.testing.full_disk:fill_and_read_no_weights", given=given)
    said = sentence(process)
    assert "cannot be written: the file system is read-only; name another place" in said
    assert list(commands.output.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_file_system_that_is_read_only(
    commands: Any, sentence: Told, mounted: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    server, place, _ = mounted("mount -t tmpfs -o ro tmpfs")
    said = sentence(server.run(commands.words(name, place / "output"), tmp_path / "log"))
    assert "cannot be written: the file system is read-only" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_written(commands: Any, sentence: Told) -> None:
    commands.output.mkdir()
    commands.output.chmod(0o500)
    try:
        said = sentence(commands.run("lora"))
    finally:
        commands.output.chmod(0o700)
    assert "cannot be written: permission denied; name a place that you may write to" in said


# ---------------------------------------------------------------------- two processes, and signals

BUSY = {
    "lora": "run/stages/current/checkpoint-2",
    "gptq": "run/manifest.json",
    "generate": "answers.jsonl",
    "recipe": "run/trained/manifest.json",
}


def _begun(commands: Any, name: str, *, written: bool = False, **options: Any) -> Started:
    """Start a command and wait for what it begins with; ``written``: until something stands in it."""
    process = commands.start(name, **options)
    deadline = time.monotonic() + 120
    busy = commands.output / BUSY[name]
    while not busy.exists() or (written and not busy.stat().st_size):
        assert process.poll() is None, process.said()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return process


@pytest.mark.parametrize("name", [*SHORT, pytest.param("recipe", marks=pytest.mark.slow)])
def test_a_second_process_is_refused(commands: Any, sentence: Told, name: str) -> None:
    """As long as the first one runs, and no longer, however it ended."""
    first = _begun(commands, name)
    # Stopped, so that it is not over before the second has looked.
    first.send(signal.SIGSTOP)
    try:
        for flags in ([], ["--resume"]):
            said = sentence(commands.run(name, *flags, log="second"))
            assert "by another process; wait for it or name another --output" in said
        assert first.poll() is None
    finally:
        first.send(signal.SIGKILL)
        first.wait()
    commands.resumed(name)


@pytest.mark.parametrize(
    ("name", "number", "code"),
    [
        ("lora", signal.SIGTERM, 143),
        ("gptq", signal.SIGINT, 130),
        ("generate", signal.SIGTERM, 143),
        ("generate", signal.SIGINT, 130),
    ],
)
def test_a_process_that_is_told_to_stop(commands: Any, name: str, number: int, code: int) -> None:
    process = _begun(commands, name, written=True)
    process.send(number)
    assert process.wait() == code, process.said()
    word = {143: "terminated", 130: "interrupted"}[code]
    assert (
        f"{word}; where a run or a file was begun, the same command with --resume goes on" in process.said()
    )
    assert "Traceback" not in process.said()
    assert unfinished(commands.output) == []
    commands.resumed(name)
