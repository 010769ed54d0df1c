"""Wheels, installed where no checkout is: what a user who types ``pip install`` gets."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from graftwork.scaffold import create

ROOT = Path(__file__).parents[1]
UV = Path(sys.executable).with_name("uv")
BUILT = ("core", "kernels", "plugins/sparta")
# What belongs to the checkout and must not be seen from the new environment.
OURS = ("graftwork", "_graftwork", "_editable_impl_", "__editable__")

pytestmark = pytest.mark.skipif(not UV.exists(), reason="needs uv beside this Python")


def _environment() -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # uv does not read pip's own settings; where pip knows extra wheels, hand them on.
    links = env.get("UV_FIND_LINKS") or env.get("PIP_FIND_LINKS")
    return {**env, "OMP_NUM_THREADS": "1", **({"UV_FIND_LINKS": links} if links else {})}


def _uv(*words: object) -> None:
    done = subprocess.run(
        [UV, *map(str, words)], capture_output=True, text=True, check=False, env=_environment()
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("wheels")
    for distribution in BUILT:
        _uv("build", "--quiet", "--wheel", ROOT / distribution, "--out-dir", folder)
    found = sorted(folder.glob("*.whl"))
    assert len(found) == len(BUILT)
    return found


@pytest.fixture(scope="module")
def third_party(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to everything installed here that is not ours."""
    # dill, which datasets hashes with, knows libraries by this name of their folder.
    folder = tmp_path_factory.mktemp("third-party") / "site-packages"
    folder.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(OURS):
            (folder / entry.name).symlink_to(entry)
    return folder


@dataclass(frozen=True)
class Installed:
    """A fresh environment."""

    root: Path

    @property
    def python(self) -> Path:
        return self.root / "bin/python"

    def call(self, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.root / "bin/trainer", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            env=_environment(),
        )


@pytest.fixture(scope="module")
def make(
    wheels: list[Path], third_party: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Installed]:
    def create() -> Installed:
        new = Installed(tmp_path_factory.mktemp("env"))
        _uv("venv", "--quiet", "--allow-existing", "--python", sys.executable, new.root)
        _uv("pip", "install", "--quiet", "--no-deps", "--python", new.python, *wheels)
        (site,) = new.root.glob("lib/python*/site-packages")
        (site / "third_party.pth").write_text(f"{third_party}\n")
        return new

    return create


@pytest.fixture(scope="module")
def installed(make: Callable[[], Installed]) -> Installed:
    return make()


def test_wheels_hold_the_package_its_recipes_and_no_tests(wheels: list[Path]) -> None:
    names = {wheel.name.partition("-")[0]: zipfile.ZipFile(wheel).namelist() for wheel in wheels}
    assert set(names) == {"graftwork", "graftwork_kernels", "graftwork_sparta"}
    assert "graftwork_sparta/recipes/claim.yaml" in names["graftwork_sparta"]
    assert "graftwork/testing/models.py" in names["graftwork"]
    templates = ROOT / "core/src/graftwork/templates"
    written = [path.relative_to(templates) for path in templates.rglob("*") if path.is_file()]
    assert {f"graftwork/templates/{path.as_posix()}" for path in written} <= set(names["graftwork"])
    assert "graftwork/templates/common/.github/workflows/test.yml" in names["graftwork"]
    for package, files in names.items():
        assert all(file.startswith((f"{package}/", f"{package}-")) for file in files), files
        ours = [file for file in files if not file.startswith("graftwork/templates/")]
        assert not [file for file in ours if "/tests/" in file or file.endswith(".pyc")]


def test_the_environment_does_not_see_the_checkout(installed: Installed, tmp_path: Path) -> None:
    code = (
        "import sys, importlib.metadata as m, importlib.util as u\n"
        "for name in ('graftwork', 'graftwork_kernels', 'graftwork_sparta'):\n"
        "    print(u.find_spec(name).origin)\n"
        "print(*sys.path, sep='\\n')\n"
        "assert u.find_spec('graftwork_cl_baselines') is None\n"
        "names = [d.name for d in m.distributions() if d.name.startswith('graftwork')]\n"
        "assert sorted(names) == ['graftwork', 'graftwork-kernels', 'graftwork-sparta'], names\n"
    )
    done = subprocess.run(
        [installed.python, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=_environment(),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(Path(line).is_relative_to(installed.root) for line in lines[:3]), lines
    assert not [line for line in lines if line.startswith(str(ROOT))], lines


def test_list_and_show(installed: Installed, tmp_path: Path) -> None:
    listed = installed.call("plugins", "list", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert [line.split() for line in listed.stdout.splitlines()[1:]] == [
        ["sparta", "graftwork-sparta", "0.1.0"]
    ]
    shown = installed.call("plugins", "show", "sparta", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "recipes: sparta:claim" in shown.stdout
    assert "rank_specific" in shown.stdout


def test_a_new_plugin_is_written_whole(installed: Installed, tmp_path: Path) -> None:
    done = installed.call("plugins", "new", "fresh", "--kind", "loss", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    from_checkout = create("fresh", "loss", tmp_path / "from-checkout")
    files = [path.relative_to(from_checkout) for path in from_checkout.rglob("*") if path.is_file()]
    assert Path(".github/workflows/test.yml") in files
    for file in files:
        assert (tmp_path / "graftwork-fresh" / file).read_bytes() == (from_checkout / file).read_bytes()


def test_train(installed: Installed, checkpoint: Path, stream: Path, tmp_path: Path) -> None:
    words = ["train", "--model", checkpoint, "--data", stream, "--plugin", "sparta", "--output", "run"]
    for setting in (
        "train.max_steps=1",
        "train.save_strategy=no",
        "evaluate.cells=final",
        "evaluate.max_new_tokens=2",
        "plugins.sparta.block_layers=1",
    ):
        words += ["--set", setting]
    done = installed.call(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for name in ("result.json", "manifest.json", "report.html", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).stat().st_size > 0


def test_uninstalling_a_plugin_removes_it(
    make: Callable[[], Installed], checkpoint: Path, stream: Path, tmp_path: Path
) -> None:
    without = make()
    _uv("pip", "uninstall", "--quiet", "--python", without.python, "graftwork-sparta")
    listed = without.call("plugins", "list", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert "sparta" not in listed.stdout
    assert "no plugins are installed" in listed.stdout
    words = ["train", "--model", checkpoint, "--data", stream, "--plugin", "sparta", "--output", "run"]
    refused = without.call(*words, cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: plugin 'sparta' is not installed")
    assert "pip install graftwork-sparta" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
