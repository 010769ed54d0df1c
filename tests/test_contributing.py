"""CONTRIBUTING.md is true: its example is taken from the page, installed, tested and trained with."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graftwork.hookspecs import GraftworkHooks

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"(?:# |<!-- )(\S+\.\w+)(?: -->)?\n")
QUICK = (
    "train.max_steps=1",
    "train.logging_steps=1",
    "train.save_strategy=no",
    "evaluate.cells=final",
    "evaluate.max_new_tokens=2",
)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's files, as they stand on the page."""
    root = tmp_path_factory.mktemp("example")
    for _, body in FENCE.findall(TEXT):
        first = FILE.match(body)
        if first:
            path = root / first[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body[first.end() :], encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def site(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the example is installed into, by a real installer."""
    target = tmp_path_factory.mktemp("site")
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("needs uv beside this Python")
    links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    done = subprocess.run(
        [
            uv,
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--python",
            sys.executable,
            "--target",
            target,
            example,
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **({"UV_FIND_LINKS": links} if links else {})},
    )
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    return site


def test_the_page_has_the_five_files(example: Path) -> None:
    files = {str(path.relative_to(example)) for path in example.rglob("*") if path.is_file()}
    assert files == {
        "pyproject.toml",
        "README.md",
        "src/graftwork_l2_start/__init__.py",
        "src/graftwork_l2_start/recipes/claim.yaml",
        "tests/test_l2_start.py",
    }


def test_the_example_passes_its_own_test(example: Path, site: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "tests"],
        capture_output=True,
        text=True,
        check=False,
        cwd=example,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "4 passed" in done.stdout


def test_the_example_is_formatted_and_clean(example: Path) -> None:
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("needs ruff beside this Python")
    for words in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run(
            [ruff, *words, "--config", ROOT / "pyproject.toml", example],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def _commands() -> list[list[str]]:
    bodies = [body for language, body in FENCE.findall(TEXT) if language == "console"]
    return [shlex.split(line) for body in bodies for line in body.splitlines() if line.startswith("trainer ")]


def test_the_commands_on_the_page_work(
    trainer: Callable[..., Any], installed: Path, checkpoint: Path, stream: Path
) -> None:
    commands = _commands()
    assert [words[1] for words in commands] == ["plugins", "train", "train", "run"]
    stand_ins = {"smollm2-135m": str(checkpoint), "tasks/": str(stream)}
    for number, words in enumerate(commands):
        given = [stand_ins.get(word, word) for word in words[1:]]
        if given[0] in ("train", "run"):
            given += ["--output", f"run-{number}"]
        if given[0] == "train":
            given += [word for setting in QUICK for word in ("--set", setting)]
        if "sparta" in given:
            given += ["--set", "plugins.sparta.block_layers=1"]
        outcome = trainer(*given)
        assert outcome.code == 0, outcome.err
        if given[0] == "plugins":
            assert "weight of half the squared distance" in outcome.out
            assert "hooks:   loss_terms" in outcome.out
            assert "recipes: l2-start:claim" in outcome.out
        elif given[0] == "train":
            assert "loss/l2_start" in (Path(given[given.index("--output") + 1]) / "metrics.jsonl").read_text()


def test_the_claim_can_be_resolved_at_every_size(trainer: Callable[..., Any], installed: Path) -> None:
    outcome = trainer("run", "l2-start:claim", "--size", "small", "--dry-run", "--set", "model=tiny-random")
    assert outcome.code == 0, outcome.err
    assert "strength=0.1" in outcome.out


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
