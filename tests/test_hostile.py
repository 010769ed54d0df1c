"""Hostile input: each ends in one sentence and exit code 2, with nothing executed and nothing left behind.

What can run code when it is read (a pickle) touches a file here, which must not be there afterwards.
"""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from graftwork.cli import main
from graftwork.hookspecs import GraftworkHooks
from graftwork.plugins import Plugins
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FAST = (
    "max_steps=4",
    "learning_rate=1e-2",
    "per_device_train_batch_size=4",
    "save_strategy=steps",
    "save_steps=1",
)
SETS = [word for field in FAST for word in ("--set", f"train.{field}")]
GOOD = "from graftwork import hookimpl\nclass Plugin:\n    def __init__(self, options): pass\n"


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def bomb(marker: Path) -> bytes:
    raw = pickle.dumps(Bomb(marker))
    pickle.loads(raw)
    assert marker.exists(), "the bomb works"
    marker.unlink()
    return raw


@pytest.fixture
def refused(trainer: Callable[..., Any], marker: Path, tmp_path: Path) -> Callable[..., str]:
    """Call ``trainer``, check that it refuses in a sentence and executes nothing; return the sentence."""

    def call(*words: object, kept: tuple[Path, ...] = ()) -> str:
        outcome = trainer(*words)
        assert outcome.code == 2, outcome
        told = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
        assert len(told) == 1, outcome.err
        assert "Traceback" not in outcome.err
        assert not marker.exists(), "something of the input was executed"
        if not kept:
            assert not (tmp_path / "cwd/out").exists(), "bad input left files behind"
        return told[0].removeprefix("error: ")

    return call


@pytest.fixture
def train(checkpoint: Path, stream: Path) -> Callable[..., list[object]]:
    """Return the words of a training that would work but for what is replaced."""

    def words(**other: object) -> list[object]:
        given = {"model": checkpoint, "data": stream, "output": "out", **other}
        return ["train", *(word for key, value in given.items() for word in (f"--{key}", value)), *SETS]

    return words


# ---------------------------------------------------------------------- pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl", "model.ckpt"])
def test_a_model_that_is_a_pickle(
    name: str, refused: Any, train: Any, bomb: bytes, checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    (tmp_path / "model" / name).write_bytes(bomb)
    assert "pickle" in refused(*train(model=tmp_path / "model"))
    assert "pickle" in refused(
        "transform", "--model", tmp_path / "model", "--plugin", "rtn", "--output", "out"
    )
    refused(*train(model=tmp_path / "model" / name))


def test_an_adapter_that_is_a_pickle(refused: Any, bomb: bytes, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(checkpoint), "r": 2})
    )
    (folder / "adapter_model.bin").write_bytes(bomb)
    assert "adapter" in refused("generate", "--model", folder, "--prompt", "hello")


@pytest.mark.parametrize("name", ["items.jsonl", "items.json", "items.pkl", "items.parquet"])
def test_data_that_is_a_pickle(name: str, refused: Any, train: Any, bomb: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(bomb)
    refused(*train(data=tmp_path / name))


def test_data_in_an_archive_that_leaves_its_folder(refused: Any, train: Any, tmp_path: Path) -> None:
    """No archive is ever unpacked, so none can write elsewhere."""
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("../escaped.jsonl", '{"text": "a"}')
    refused(*train(data=tmp_path / "data.zip"))
    refused(*train(model=tmp_path / "data.zip"))
    assert not list(tmp_path.rglob("escaped.jsonl"))


STOPPER = """
import os
from graftwork import hookimpl

class Plugin:
    def __init__(self, options):
        self.batches = 0

    @hookimpl
    def batch_begin(self, run, model, batch):
        self.batches += 1
        if os.environ.get("STOP_AT") == str(self.batches):
            raise KeyboardInterrupt
"""


@pytest.fixture
def cut(
    trainer: Any, train: Any, install: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[list[object], Path]:
    """A run that was stopped in the middle of a task: the words to go on with it, and its last checkpoint."""
    install("stopper", "stopper_module", STOPPER)
    words = [*train(), "--plugin", "stopper"]
    monkeypatch.setenv("STOP_AT", "3")
    assert trainer(*words).code == 130
    monkeypatch.delenv("STOP_AT")
    (*_, last) = sorted((tmp_path / "cwd/out/stages/current").glob("checkpoint-*"))
    return [*words, "--resume"], last


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_state_of_a_checkpoint_that_was_replaced_by_a_pickle(
    name: str, refused: Any, cut: tuple[list[object], Path], marker: Path, tmp_path: Path
) -> None:
    words, checkpoint = cut
    assert (checkpoint / name).exists()
    torch.save({"state": Bomb(marker)}, checkpoint / name)
    sentence = refused(*words, kept=(tmp_path / "cwd/out",))
    assert name in sentence
    assert not (tmp_path / "cwd/out/result.json").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda one: one["job"].update(seed=7), "belongs to a run with other settings: 'seed'"),
        (lambda one: one["plugins"]["stopper"].update(version="9.9"), "'stopper' 9.9, installed is 1.0"),
        (lambda one: one.update(job="../../etc"), ""),
        (lambda one: one.pop("plugins"), "is not a manifest that a run wrote"),
    ],
)
def test_a_manifest_that_was_edited(
    change: Callable[[dict[str, Any]], Any], told: str, refused: Any, cut: Any, tmp_path: Path
) -> None:
    words, _ = cut
    path = tmp_path / "cwd/out/manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    assert told in refused(*words, kept=(path,))


# ---------------------------------------------------------------------- files that lie about their size


@pytest.mark.parametrize("claimed", [10 * 2**30, 2**63, 0, 3])
def test_a_header_of_safetensors_that_claims_what_is_not_there(
    claimed: int, refused: Any, train: Any, checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + path.read_bytes()[8:])
    began = time.monotonic()
    refused(*train(model=tmp_path / "model"))
    refused("transform", "--model", tmp_path / "model", "--plugin", "rtn", "--output", "out")
    assert time.monotonic() - began < 60


def test_an_index_that_names_a_file_elsewhere(refused: Any, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    refused("transform", "--model", tmp_path / "model", "--plugin", "rtn", "--output", "out")


# ---------------------------------------------------------------------- recipes


def bomb_of_aliases() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join(lines) + "\nmodel: *a11\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (bomb_of_aliases(), ""),
        ("model: tiny-random\ndata: tiny\nsteps:\n  - {name: ../../escape}\n", "needs a 'name' of letters"),
        ("model: tiny-random\ndata: tiny\nsteps:\n  - {name: /etc/passwd}\n", "needs a 'name' of letters"),
        ("model: tiny-random\ndata: tiny\nplugins: {../../evil: {}}\n", "is not installed"),
        ("model: !!python/object/apply:os.system ['touch executed']\ndata: tiny\n", ""),
        ("model: " + "[" * 5000 + "]" * 5000, ""),
        ("model: tiny-random\n\x00data: tiny\n", ""),
        ("- 1\n- 2\n", ""),
    ],
)
def test_a_recipe_that_means_harm(text: str, told: str, refused: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    began = time.monotonic()
    assert told in refused("run", tmp_path / "recipe.yaml", "--output", "out")
    assert time.monotonic() - began < 30
    assert not list(tmp_path.rglob("executed"))


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20))
KEYS = st.one_of(
    st.sampled_from(
        ["model", "data", "plugins", "steps", "train", "seed", "expect", "sizes", "repeat", "ref"]
    ),
    st.text(max_size=8),
)
TREES = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4))
)


def quietly(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run ``trainer``, which must end with a verdict and never with an exception of its own."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    told = capsys.readouterr().err
    assert ended.value.code in (0, 2), told
    if ended.value.code == 2:
        assert told.startswith("error: ")
        assert "Traceback" not in told


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(tree=st.dictionaries(KEYS, TREES, max_size=5))
def test_any_tree_as_a_recipe_ends_with_a_verdict(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fuzzed.yaml"
    path.write_text(yaml.safe_dump({"model": "tiny-random", "data": "tiny", **tree}, allow_unicode=True))
    quietly(["run", str(path), "--dry-run"], capsys)


@FUZZ
@given(key=st.text(max_size=24), value=st.text(max_size=24))
def test_any_setting_ends_with_a_verdict(key: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--model=tiny-random", "--data=tiny", f"--set={key}={value}", "--dry-run"]
    quietly(words, capsys)
    quietly([*words[:3], f"--set=plugins.sparta.{key}={value}", "--dry-run"], capsys)


# ---------------------------------------------------------------------- plugins


@pytest.mark.parametrize(
    "code",
    [
        "raise SystemExit(0)",
        "import sys\nsys.exit('bye')",
        "raise RuntimeError('no')",
        "1 / 0",
        "def (:",
    ],
)
def test_a_plugin_whose_import_ends_badly(code: str, refused: Any, train: Any, install: Any) -> None:
    install("rude", "rude_module", code)
    sentence = refused(*train(), "--plugin", "rude")
    assert "plugin 'rude'" in sentence
    assert "cannot be imported" in sentence
    assert {"SystemExit", "RuntimeError", "ZeroDivisionError", "SyntaxError"} & set(
        sentence.replace(":", " ").split()
    )


def test_a_plugin_that_is_not_named_is_not_imported(trainer: Any, install: Any, marker: Path) -> None:
    install("spy", "spy_module", f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    assert trainer("plugins", "list").code == 0
    assert trainer("--help").code == 0
    assert not marker.exists()
    assert "spy_module" not in sys.modules


@pytest.mark.parametrize(
    "name", ["sp\u0430rta", "sparta\u200b", "../sparta", "Sparta", "spar ta", "sparta\x1b[2J", "-sparta"]
)
def test_a_name_that_looks_like_another(name: str, trainer: Any, refused: Any, install: Any) -> None:
    """Names are of small letters, digits and hyphens; what else an entry point says is told and not used."""
    install(name, "alike_module", GOOD, package="graftwork-alike")
    sentence = refused("plugins", "list")
    assert "graftwork-alike" in sentence
    assert "\x1b" not in sentence


HOOKS = [name for name in vars(GraftworkHooks) if not name.startswith("_")]


@pytest.mark.parametrize("error", [ValueError("inside"), SystemExit(0), MemoryError()])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_plugin_that_raises_in_a_hook_is_named(hook: str, error: BaseException) -> None:
    from graftwork.errors import PluginError
    from graftwork.hookspecs import hookimpl

    def failing(self: Any) -> None:
        raise error

    plugin = type("Failing", (), {hook: hookimpl(failing)})()
    plugins = Plugins({"failing": plugin})
    asked = dict.fromkeys(getattr(plugins.manager.hook, hook).spec.argnames)
    with pytest.raises(PluginError, match=f"plugin 'failing' failed in hook '{hook}'") as caught:
        plugins.call(hook, **asked)
    assert caught.value.__cause__ is error
