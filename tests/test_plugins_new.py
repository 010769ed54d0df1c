"""``trainer plugins new``: every kind's plugin keeps every promise at once, and bad input leaves nothing behind."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from graftwork import UserError
from graftwork.cli import new_plugin
from graftwork.hookspecs import hookimpl
from graftwork.plugins import load_class
from graftwork.recipe import load
from graftwork.scaffold import KINDS, LONGEST, TEMPLATES, create
from graftwork.testing.conformance import check

BIN = Path(sys.executable).parent
HOOKS = {
    "adapter": {"adapter_config"},
    "loss": {"loss_terms"},
    "logits": {"logits_processors", "before_forward"},
    "transform": {"weight_transforms"},
    "trainer": {"check", "training_algorithm"},
    "data": {"data_sources"},
    "benchmark": {"benchmarks"},
}


def name_of(kind: str) -> str:
    return f"new-{kind}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The distribution of every kind."""
    root = tmp_path_factory.mktemp("made")
    return {kind: create(name_of(kind), kind, root / kind) for kind in KINDS}


def lay_out(distribution: Path, site: Path) -> None:
    """Write what an installer writes, without building: package, metadata, entry point."""
    project = tomllib.loads((distribution / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    head = [
        "Metadata-Version: 2.4",
        f"Name: {project['name']}",
        f"Version: {project['version']}",
        f"Summary: {project['description']}",
        *(f"Requires-Dist: {one}" for one in project["dependencies"]),
    ]
    readme = (distribution / project["readme"]).read_text(encoding="utf-8")
    (info / "METADATA").write_text("\n".join(head) + f"\n\n{readme}", encoding="utf-8")
    points = project["entry-points"]["graftwork.plugins"]
    lines = "".join(f"{name} = {target}\n" for name, target in points.items())
    (info / "entry_points.txt").write_text(f"[graftwork.plugins]\n{lines}", encoding="utf-8")
    shutil.copytree(distribution / "src", site, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def installed(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All of them can be found, in this module only, and by the processes that its tests start."""
    site = tmp_path_factory.mktemp("site")
    for distribution in made.values():
        lay_out(distribution, site)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("PYTHONPATH", str(site))
        importlib.invalidate_caches()
        yield
    for module in [name for name in sys.modules if name.startswith("graftwork_new_")]:
        del sys.modules[module]
    importlib.invalidate_caches()


# ---------------------------------------------------------------------- what is written


def test_the_command_knows_the_kinds_that_there_are() -> None:
    (kind,) = [one for one in new_plugin.params if one.name == "kind"]
    assert list(kind.type.choices) == list(KINDS) == list(HOOKS)
    assert {path.name for path in TEMPLATES.iterdir()} == {"common", *KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_distribution_is_complete(made: dict[str, Path], kind: str) -> None:
    root, module = made[kind], f"graftwork_new_{kind}"
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert files >= {
        "pyproject.toml",
        "README.md",
        ".gitignore",
        ".github/workflows/test.yml",
        f"src/{module}/__init__.py",
        f"src/{module}/recipes/claim.yaml",
        f"tests/test_{module}.py",
    }
    for name in files:
        text = (root / name).read_text(encoding="utf-8")
        assert ".tmpl" not in name + text
        assert "{{" not in name + text.replace("${{", "").replace("f'{{", ""), name
    workflow = yaml.safe_load((root / ".github/workflows/test.yml").read_text())
    runs = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert runs[-1] == f"trainer plugins check {name_of(kind)}"
    readme = (root / "README.md").read_text(encoding="utf-8")
    for heading in ("Install and use", "What it computes", "Options", "Does the claim hold?"):
        assert f"## {heading}\n" in readme
    assert "Without the trainer" in readme
    assert "| part | comes from |" in readme
    assert "ours (template)" in readme


# That of the kind loss is checked with the transcript, in test_contributing.py.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "loss"])
def test_every_promise_that_needs_no_run_is_kept(installed: None, kind: str, tmp_path: Path) -> None:
    found = check(name_of(kind), tmp_path, static=True)
    assert [one for one in found if one.verdict == "failed"] == []
    plugin = load_class(name_of(kind))
    implemented = {
        name for name, value in vars(plugin).items() if hasattr(value, f"{hookimpl.project_name}_impl")
    }
    assert implemented == HOOKS[kind]
    if kind != "adapter":  # an adapter trains, so that none of its settings is the plain model
        plugin.Options.model_validate(plugin.neutral)


@pytest.mark.parametrize("kind", KINDS)
def test_the_claim_has_a_baseline_and_two_sizes(installed: None, made: dict[str, Path], kind: str) -> None:
    path = made[kind] / f"src/graftwork_new_{kind}/recipes/claim.yaml"
    small, smoke = (load(path, size=size) for size in ("small", "smoke"))
    assert len(small.arms) == len(smoke.arms) == 2
    assert small.expect
    assert not smoke.expect
    assert all(spec.job.model.ref == "tiny-random" for spec in smoke.jobs)


def test_it_is_formatted_and_clean_whatever_it_is_called(tmp_path: Path) -> None:
    ruff = BIN / "ruff"
    if not ruff.exists():
        pytest.skip("needs ruff beside this Python")
    for kind in KINDS:
        longest = f"{kind}-of-a-very-long-name-that-has-no-end"[:LONGEST].rstrip("-")
        for name in (f"x{kind[0]}", f"my-{kind}", longest, longest.replace("-", "")):
            create(name, kind, tmp_path / name / kind)
    for words in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run([ruff, *words, tmp_path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:]


def test_a_name_that_begins_with_a_digit_has_a_class_all_the_same(tmp_path: Path) -> None:
    folder = create("2d-loss", "loss", tmp_path / "new")
    assert "class Plugin2dLoss:" in (folder / "src/graftwork_2d_loss/__init__.py").read_text()
    assert '2d-loss = "graftwork_2d_loss:Plugin2dLoss"' in (folder / "pyproject.toml").read_text()


def test_the_command_says_what_to_do_next(trainer: Callable[..., Any]) -> None:
    outcome = trainer("plugins", "new", "my-loss", "--kind", "loss", "--output", "a folder/mine")
    assert outcome.code == 0, outcome.err
    assert "pip install -e 'a folder/mine'" in outcome.out
    assert "trainer plugins check my-loss" in outcome.out
    assert Path("a folder/mine/pyproject.toml").is_file()


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("Bad", "loss", "is no name for a plugin"),
        ("a_b", "loss", "is no name for a plugin"),
        ("-a", "loss", "no such option '-a'"),
        ("a--b", "loss", "is no name for a plugin"),
        ("a/../../b", "loss", "is no name for a plugin"),
        ("", "loss", "is no name for a plugin"),
        ("caf\u00e9", "loss", "is no name for a plugin"),
        ("a\n", "loss", "is no name for a plugin"),
        ("a" * (LONGEST + 1), "loss", f"{LONGEST} are the most"),
        ("none", "loss", "a word of Python's own"),
        ("lambda", "loss", "a word of Python's own"),
        ("value-error", "trainer", "a word of Python's own"),
        ("options", "loss", "its file has another Options"),
        ("focal-trainer", "trainer", "its file has another FocalTrainer"),
        ("sparta", "loss", "a plugin 'sparta' is installed already, by package graftwork-sparta"),
        ("kernels", "loss", "a package graftwork-kernels 0.1.0 is installed already"),
        ("importable", "loss", "a module graftwork_importable can be imported already"),
        ("fine", "los", "'los' is not one of 'adapter', 'loss'"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    trainer: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kind: str,
    words: str,
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "graftwork_importable.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(str(site))
    outcome = trainer("plugins", "new", name, "--kind", kind)
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert words in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert list(Path().iterdir()) == []


def test_a_kind_that_there_is_not_is_told_to_callers_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no kind 'losss' \(did you mean 'loss'\?\)"):
        create("fine", "losss", tmp_path / "new")


def test_what_is_there_stays(trainer: Callable[..., Any]) -> None:
    Path("graftwork-fine").mkdir()
    Path("graftwork-fine/mine").write_text("mine")
    Path("dangling").symlink_to("nowhere")
    Path("file").write_text("mine")
    for words in ([], ["--output", "dangling"], ["--output", "file"]):
        outcome = trainer("plugins", "new", "fine", "--kind", "data", *words)
        assert outcome.code == 2
        assert "exists already; name another folder with --output" in outcome.err
    assert trainer("plugins", "new", "fine", "--kind", "data", "--output", "file/new").code == 2
    assert Path("graftwork-fine/mine").read_text() == Path("file").read_text() == "mine"
    assert sorted(path.name for path in Path().iterdir()) == ["dangling", "file", "graftwork-fine"]


def test_a_full_disk_leaves_nothing(trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    write, count = Path.write_text, []

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        count.append(self)
        if len(count) == 5:
            raise OSError(28, os.strerror(28))
        return write(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    outcome = trainer("plugins", "new", "fine", "--kind", "transform")
    monkeypatch.undo()
    assert outcome.code == 2
    assert "'graftwork-fine' cannot be written: the disk is full" in outcome.err
    assert len(count) == 5


# ---------------------------------------------------------------------- as a user would, whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_its_own_tests_pass_and_it_keeps_every_promise(
    made: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    uv = BIN / "uv"
    if not uv.exists():
        pytest.skip("needs uv beside this Python")
    links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS")
    env = {**os.environ, "OMP_NUM_THREADS": "1", **({"UV_FIND_LINKS": links} if links else {})}
    target = tmp_path / "site"
    words = ["--quiet", "--no-deps", "--python", sys.executable, "--target", target]
    done = subprocess.run(
        [uv, "pip", "install", *words, made[kind]], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    env["PYTHONPATH"] = str(target)
    for command in (
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        ["-m", "graftwork", "plugins", "check", name_of(kind)],
    ):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, check=False, env=env, cwd=made[kind]
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
