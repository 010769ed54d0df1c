"""CONTRIBUTING.md is true: its transcript runs, and what it shows of a new plugin is what is written."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graftwork.hookspecs import HOOKS_VERSION, GraftworkHooks
from graftwork.scaffold import KINDS, create

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = TEXT.partition("## Write a plugin in ten minutes")[2].partition("\n## ")[0]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"(?:# |<!-- )(\S+\.\w+)(?: -->)?\n")
NAME = "l2-start"
QUICK = (
    "train.max_steps=1",
    "train.logging_steps=1",
    "train.save_strategy=no",
    "evaluate.cells=final",
    "evaluate.max_new_tokens=2",
)


def transcript() -> list[list[str]]:
    """Return the command lines of the page, in its order."""
    bodies = [body for language, body in FENCE.findall(SECTION) if language == "console"]
    return [shlex.split(line) for body in bodies for line in body.splitlines()]


def called(*words: Any, cwd: Path) -> str:
    """Run a program of this environment to its end, offline, and return what it printed."""
    links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    env = {**os.environ, "OMP_NUM_THREADS": "1", **({"UV_FIND_LINKS": links} if links else {})}
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution, as the transcript's second line makes it."""
    words = transcript()[1]
    assert words == ["trainer", "plugins", "new", NAME, "--kind", "loss"]
    return create(NAME, "loss", tmp_path_factory.mktemp("made") / f"graftwork-{NAME}")


@pytest.fixture(scope="module")
def site(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that it is installed into, by a real installer; in this environment it would stay."""
    uv = BIN / "uv"
    if not uv.exists():
        pytest.skip("needs uv beside this Python")
    target = tmp_path_factory.mktemp("site")
    words = (
        uv,
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--python",
        sys.executable,
        "--target",
        target,
        made,
    )
    called(*words, cwd=made)
    return target


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    importlib.invalidate_caches()
    return site


def test_the_page_lists_the_files_that_are_written(made: Path) -> None:
    (listing,) = [body for language, body in FENCE.findall(SECTION) if language == "text"]
    written = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    assert {line.split()[0] for line in listing.splitlines()} == written


def test_what_the_page_shows_is_what_is_written(made: Path) -> None:
    shown = [(FILE.match(body), body) for _, body in FENCE.findall(SECTION)]
    names = []
    for first, body in shown:
        if first:
            names.append(first[1])
            assert body[first.end() :] in (made / first[1]).read_text(encoding="utf-8"), first[1]
    assert names == [
        "src/graftwork_l2_start/__init__.py",
        "src/graftwork_l2_start/recipes/claim.yaml",
        "tests/test_graftwork_l2_start.py",
        "README.md",
        "pyproject.toml",
    ]
    # The method and its claim are shown whole.
    whole = [body[first.end() :] for first, body in shown if first][:2]
    assert whole == [(made / name).read_text(encoding="utf-8") for name in names[:2]]


def test_the_page_names_every_kind() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .*`(\w+)` \|$", SECTION, re.MULTILINE)
    assert [kind for kind, _ in rows] == list(KINDS)
    assert {hook for _, hook in rows} <= vars(GraftworkHooks).keys()


def test_the_transcript_runs(
    trainer: Callable[..., Any], installed: Path, made: Path, checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    mine = shutil.copytree(made, tmp_path / "mine")
    stand_ins = {"smollm2-135m": str(checkpoint), "tiny": str(stream)}
    ran = []
    for number, words in enumerate(transcript()):
        ran.append(" ".join(words[: 3 if words[0] != "trainer" else 2 + (words[1] == "plugins")]))
        if words[0] != "trainer":
            if words[:2] == ["python", "-m"]:
                # Pip would take as long again to install what uv has at hand.
                more = ["--installer", "uv"] if words[2] == "build" else ["-q", "-p", "no:cacheprovider"]
                out = called(sys.executable, *words[1:], *more, cwd=mine)
                assert words[2] != "pytest" or "5 passed" in out
            continue
        given = [stand_ins.get(word, word) for word in words[1:]]
        if given[0] in ("train", "run"):
            given += ["--output", f"run-{number}"]
        if given[0] == "train":
            given += [word for setting in QUICK for word in ("--set", setting)]
        if "sparta" in given:
            given += ["--set", "plugins.sparta.block_layers=1"]
        if given[1] == "new":
            # It is installed by now.
            assert trainer(*given).code == 2
            continue
        if given[1] == "check":
            # The promises of its runs are kept in test_plugins_new.py, which is slow.
            given.append("--static")
        outcome = trainer(*given)
        assert outcome.code == 0, outcome.err
        if given[1] == "show":
            assert "weight of half the squared distance" in outcome.out
            assert "hooks:   loss_terms" in outcome.out
            assert "recipes: l2-start:claim" in outcome.out
            assert "Li, Grandvalet and Davoine" in " ".join(outcome.out.split())
        elif given[0] == "train":
            assert "loss/l2_start" in (Path(given[given.index("--output") + 1]) / "metrics.jsonl").read_text()
    assert ran == [
        "pip install graftwork",
        "trainer plugins new",
        "cd graftwork-l2-start",
        "pip install -e",
        "trainer plugins show",
        "trainer train",
        "trainer train",
        "trainer run",
        "python -m pytest",
        "trainer plugins check",
        "python -m build",
    ]
    assert [path.name for path in (mine / "dist").iterdir()] == ["graftwork_l2_start-0.1.0-py3-none-any.whl"]


def test_the_claim_can_be_resolved_at_every_size(trainer: Callable[..., Any], installed: Path) -> None:
    outcome = trainer("run", "l2-start:claim", "--size", "small", "--dry-run", "--set", "model=tiny-random")
    assert outcome.code == 0, outcome.err
    assert "strength=0.1" in outcome.out


def test_the_page_says_which_version_of_the_hooks_is_frozen() -> None:
    section = TEXT.partition("## Hooks are stable")[2].partition("\n## ")[0]
    assert f"built against {HOOKS_VERSION} " in section


def test_the_table_has_every_hook() -> None:
    section = TEXT.partition("## How hooks combine")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(name for name in vars(GraftworkHooks) if not name.startswith("_"))


def test_every_path_on_the_page_exists() -> None:
    section = TEXT.partition("## Where to find what")[2]
    paths = re.findall(r"`([\w.-]+/[\w./-]*)`", section)
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
