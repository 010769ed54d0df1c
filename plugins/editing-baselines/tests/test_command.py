"""The commands that a user types."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from graftwork.cli import main
from graftwork.edit.edits import EditSet
from graftwork.edit.layouts import write_requests
from graftwork.models import load_model
from graftwork.testing.editing import REQUESTS, editable_model
from graftwork.testing.runs import kill_when
from safetensors.torch import load_file


@pytest.fixture
def base(tmp_path: Path, tokenizer: Any) -> Path:
    editable_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    write_requests(tmp_path / "edits.jsonl", REQUESTS)
    return tmp_path / "base"


@dataclass
class Result:
    exit_code: int
    output: str


def trainer(*arguments: str) -> Result:
    """Run the command in this process, as a user would."""
    told, errors = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(errors),
        pytest.raises(SystemExit) as ended,
    ):
        main(list(arguments))
    return Result(int(ended.value.code or 0), told.getvalue() + errors.getvalue())


def words(base: Path, plugin: str, output: Path, *settings: str) -> list[str]:
    """Return the words of a transform that edits."""
    given = [
        f"plugins.{plugin}.requests={base.parent / 'edits.jsonl'}",
        f"plugins.{plugin}.max_share=50",
        *settings,
    ]
    sets = [part for one in given for part in ("--set", one)]
    return ["transform", "--model", str(base), "--plugin", plugin, *sets, "--output", str(output)]


def transform(base: Path, plugin: str, output: Path, *settings: str) -> Result:
    return trainer(*words(base, plugin, output, *settings))


TEXT = ("transform.calibration=random", "transform.samples=8", "transform.window=32")
STATE = ("plugins.memit.lam=1", "plugins.memit.state.steps=5", "plugins.memit.state.prefixes=1")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def test_a_model_is_edited_and_its_edits_lie_beside_it(base: Path, tmp_path: Path) -> None:
    found = transform(base, "memit", tmp_path / "out", *TEXT, *STATE)
    assert found.exit_code == 0, found.output
    edits = EditSet.load(tmp_path / "out")
    model = load_model(str(base))
    written = load_model(str(tmp_path / "out"))
    with edits.apply(model):
        for (name, one), (_, other) in zip(model.named_parameters(), written.named_parameters(), strict=True):
            assert one.equal(other), name
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["metrics"]["edit_share"] > 0
    assert any("of 2 targets" in note for note in result["notes"])


def test_nothing_to_change_changes_no_byte(base: Path, tmp_path: Path) -> None:
    # The loss is low enough before the first step.
    stop = "plugins.memit.state.stop=1e9"
    assert transform(base, "memit", tmp_path / "edited", *TEXT, *STATE, stop).exit_code == 0
    assert transform(base, "ft", tmp_path / "tuned", "plugins.ft.stop=1e9").exit_code == 0
    assert digests(tmp_path / "edited" / "model") == digests(tmp_path / "tuned" / "model")
    original = load_file(base / "model.safetensors")
    for path in (tmp_path / "edited" / "model").glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.numpy().tobytes() == original[name].numpy().tobytes(), name


def test_an_edit_is_followed_by_a_compression(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("graftwork_compression_baselines")
    found = transform(base, "memit", tmp_path / "out", *TEXT, *STATE, "plugins.rtn.scheme=W8A16")
    assert found.exit_code == 0, found.output
    settings = [part for one in (*TEXT, *STATE) for part in ("--set", one)]
    found = trainer(
        "transform", "--model", str(base), "--plugin", "memit", "--plugin", "rtn", *settings,
        "--set", f"plugins.memit.requests={tmp_path / 'edits.jsonl'}", "--set", "plugins.memit.max_share=50",
        "--output", str(tmp_path / "small"),
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    config = json.loads((tmp_path / "small" / "model" / "config.json").read_text())
    assert config["quantization_config"]
    assert EditSet.load(tmp_path / "small").to_bytes() == EditSet.load(tmp_path / "out").to_bytes()


def test_killed_while_states_are_found_and_while_layers_are_written(base: Path, tmp_path: Path) -> None:
    """What comes out after two kills, signal 9, is what an undisturbed run writes: model, edits, figures."""
    assert transform(base, "memit", tmp_path / "whole", *TEXT, *STATE).exit_code == 0
    cut = words(base, "memit", tmp_path / "cut", *TEXT, *STATE)
    work = tmp_path / "cut/work"
    moments = (
        (tmp_path / "cut/manifest.json").exists,
        lambda: len(list(work.glob("model-*.safetensors"))) >= 2,
    )
    for number, moment in enumerate(moments):
        kill_when([*cut, *(["--resume"] if number else [])], moment)
        assert not (tmp_path / "cut/model").exists()
    assert trainer(*cut, "--resume").exit_code == 0
    assert digests(tmp_path / "cut/model") == digests(tmp_path / "whole/model")
    assert EditSet.load(tmp_path / "cut").to_bytes() == EditSet.load(tmp_path / "whole").to_bytes()
    before, after = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "cut"))
    assert before["metrics"] == after["metrics"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            '{"id": "again", "prompt": "{} is in", "subject": "Lyon", "target": "Peru"}',
            "contradict each other",
        ),
        ('{"id": "again", "prompt": "{} is in", "subject": "Lyon", "target": "Rome"}', "ask for the same"),
        ('{"prompt": "Nice is in", "subject": "Lyon", "target": "Peru"}', "does not stand in the prompt"),
        ('{"prompt": "{} was", "subject": "Lyon", "target": ""}', "empty target"),
    ],
)
def test_bad_requests_end_with_one_sentence(base: Path, tmp_path: Path, line: str, told: str) -> None:
    with (tmp_path / "edits.jsonl").open("a") as file:
        file.write(line + "\n")
    found = transform(base, "memit", tmp_path / "out", *TEXT, *STATE)
    assert found.exit_code == 2
    assert told in found.output
    assert not (tmp_path / "out" / "model").exists()


def test_what_is_not_set_is_named(base: Path, tmp_path: Path) -> None:
    found = trainer("transform", "--model", str(base), "--plugin", "memit", "--output", str(tmp_path / "a"))
    assert found.exit_code == 2
    assert "set plugins.memit.requests=FILE" in found.output
    found = transform(base, "memit", tmp_path / "b")
    assert found.exit_code == 2
    assert "transform.calibration=FILE" in found.output
    assert (
        transform(base, "memit", tmp_path / "c", *STATE, "plugins.memit.statistics=identity").exit_code == 0
    )
    found = transform(base, "memit", tmp_path / "d", *TEXT, *STATE, "plugins.memit.max_share=1e-6")
    assert found.exit_code == 2
    assert "nothing was written" in found.output
    assert not (tmp_path / "d" / "model").exists()


def test_the_benchmark(base: Path, tmp_path: Path) -> None:
    settings = [
        f"benchmark.requests={tmp_path / 'edits.jsonl'}",
        "benchmark.corpus=random",
        "benchmark.held_out=random",
        "benchmark.window=32",
        "plugins.memit.max_share=50",
        *STATE,
    ]
    found = trainer(
        "evaluate", "--model", str(base), "--plugin", "memit", "--benchmark", "memit:editing",
        *(part for one in settings for part in ("--set", one)), "--output", str(tmp_path / "scores"),
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "drift" in found.output
    assert "before_efficacy" in found.output
