"""Files that are complete or absent."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from graftwork.errors import UserError
from graftwork.files import (
    atomic_folder,
    discard,
    is_leftover,
    sha256,
    told_when_not_written,
    wait_for_lock,
    write_json_atomic,
    write_text_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def run(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )


HOLD = """
import sys
from pathlib import Path
from graftwork.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as building:
    (building / "a").write_text("a")
    print("building", flush=True)
    sys.stdin.readline()
"""


def test_text_replaces_the_old_file_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "note.txt"
    write_text_atomic(path, "old")
    write_text_atomic(path, "neu: ä\n")
    assert path.read_text(encoding="utf-8") == "neu: ä\n"
    assert names(path.parent) == ["note.txt"]


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_text_atomic(tmp_path / "note.txt", "x")
        with atomic_folder(tmp_path / "folder") as building:
            descriptor = os.open(building / "private", os.O_CREAT | os.O_WRONLY, 0o600)
            os.close(descriptor)
    finally:
        os.umask(before)
    assert (tmp_path / "note.txt").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "folder" / "private").stat().st_mode & 0o777 == 0o644


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == ["value.json"]


def test_text_that_cannot_be_encoded_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(tmp_path / "note.txt", "\udc80")
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"'.*note.txt' cannot be written: "):
        write_text_atomic(tmp_path / "file" / "note.txt", "x")
    with (
        pytest.raises(UserError, match=r"'.*folder' cannot be written: "),
        atomic_folder(tmp_path / "file" / "folder"),
    ):
        pass


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "folder") as building:
        (building / "inner").mkdir()
        (building / "inner" / "a").write_text("a")
        assert not (tmp_path / "deep" / "folder").exists()
    assert names(tmp_path / "deep") == ["folder"]
    assert (tmp_path / "deep" / "folder" / "inner" / "a").read_text() == "a"


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_a_folder_vanishes_on_an_error(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_folder(tmp_path / "folder") as building:
        (building / "a").write_text("a")
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("io: No space left on device")]
)
def test_a_full_disk_is_one_sentence(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(UserError, match="the disk is full"), atomic_folder(tmp_path / "folder"):
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full; make room there"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "the file system is read-only"),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "files may not grow so large there"),
        (RuntimeError("basic_ios::clear: iostream error"), "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64"), "the disk is full"),
        (PermissionError(errno.EACCES, "denied", "{here}/run/file"), "permission denied; name a place"),
    ],
)
def test_whoever_could_not_write_is_told(tmp_path: Path, error: Exception, sentence: str) -> None:
    if isinstance(error, OSError) and error.filename:
        error.filename = str(error.filename).format(here=tmp_path)
    with (
        pytest.raises(UserError, match=rf"{tmp_path}/run.* cannot be written: {sentence}.*; go on$"),
        told_when_not_written(tmp_path / "run", "; go on"),
    ):
        try:
            raise error
        except Exception as cause:
            raise ValueError("a library says something else") from cause


@pytest.mark.parametrize(
    "error",
    [PermissionError(errno.EACCES, "denied", "/data/secret"), FileNotFoundError(2, "no", "x"), KeyError("a")],
)
def test_what_could_not_be_read_is_another_matter(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), told_when_not_written(tmp_path):
        raise error


def test_a_folder_goes_at_once_with_what_is_left_of_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").touch()
    (tmp_path / ".model-01234567.part").mkdir()
    (tmp_path / ".other-01234567.part").mkdir()
    discard(tmp_path / "model")
    assert names(tmp_path) == [".other-01234567.part"]
    discard(tmp_path / "model")
    assert is_leftover(tmp_path / ".other-01234567.part", "other")
    assert not is_leftover(tmp_path / ".other-01234567.part", "model")


def test_what_is_there_already_stays(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("")
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "folder"):
        pass
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["mine"]


def test_leftovers_of_the_killed_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    path = tmp_path / "[folder]"  # a name that is also a pattern
    living, killed = run(HOLD, str(path)), run(HOLD, str(path))
    try:
        assert living.stdout is not None
        assert killed.stdout is not None
        assert [living.stdout.readline(), killed.stdout.readline()] == ["building\n", "building\n"]
        killed.kill()
        killed.wait()
        assert len(names(tmp_path)) == 2
        with atomic_folder(tmp_path / "other"):
            pass
        assert len(names(tmp_path)) == 3, "another folder's leftovers are not ours to judge"
        with pytest.raises(ValueError, match="stop"), atomic_folder(path):
            assert len(names(tmp_path)) == 3
            raise ValueError("stop")
        living.communicate("\n")
        assert living.returncode == 0
        assert names(tmp_path) == ["[folder]", "other"]
        assert (path / "a").read_text() == "a"
    finally:
        for process in (living, killed):
            process.kill()
            process.communicate()


def test_leftovers_of_killed_text_writes_go(tmp_path: Path) -> None:
    (tmp_path / ".note.txt-0123abcd.part").write_text("half")
    write_text_atomic(tmp_path / "note.txt", "whole")
    assert names(tmp_path) == ["note.txt"]


def test_a_lock_keeps_a_second_process_waiting(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = (
        "import sys; from pathlib import Path; from graftwork.files import wait_for_lock\n"
        "print('ready', flush=True)\n"
        "with wait_for_lock(Path(sys.argv[1])): Path(sys.argv[2]).write_text('mine')"
    )
    with wait_for_lock(lock):
        other = run(code, str(lock), str(tmp_path / "mark"))
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.3)
        assert not (tmp_path / "mark").exists()
    other.communicate(timeout=20)
    assert (tmp_path / "mark").read_text() == "mine"


def test_sha256_of_a_known_text(tmp_path: Path) -> None:
    (tmp_path / "abc").write_text("abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
