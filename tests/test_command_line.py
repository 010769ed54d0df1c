"""The command line as a user meets it: bad input in one sentence, good input from end to end."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from graftwork.cli import main
from graftwork.files import sha256
from graftwork.yaml_lines import parse_value

HINT = "(add --debug before the verb for the traceback)"
FAST = ("max_steps=2", "learning_rate=1e-2", "per_device_train_batch_size=4", "logging_steps=1")
FAST_SETS = [word for field in (*FAST, "save_strategy=no") for word in ("--set", f"train.{field}")]


@pytest.fixture
def refused(trainer: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """Call ``trainer`` with bad input, check how it is refused, and return the sentence."""

    def call(*arguments: object, hint: bool | None = None) -> str:
        before = _contents(tmp_path)
        outcome = trainer(*arguments)
        assert outcome.code == 2, outcome
        lines = outcome.err.splitlines()
        assert lines, outcome
        assert lines[0].startswith("error: ")
        assert lines[1:] in ([], [HINT]), outcome.err
        assert hint is None or bool(lines[1:]) == hint, outcome.err
        assert outcome.out == ""
        assert _contents(tmp_path) == before, "bad input left files behind"
        sentence = lines[0].removeprefix("error: ")
        assert 10 < len(sentence) < 600
        return sentence

    return call


def _contents(folder: Path) -> dict[str, str]:
    """Return every file below ``folder`` with its hash, and every folder."""
    return {
        str(path.relative_to(folder)): sha256(path) if path.is_file() else "folder"
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


@pytest.fixture
def train(checkpoint: Path, stream: Path) -> list[object]:
    """The words of a ``trainer train`` that would work."""
    return ["train", "--model", checkpoint, "--data", stream, "--output", "out", *FAST_SETS]


@pytest.fixture
def recipe(checkpoint: Path, stream: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Write a recipe file with ``more`` lines below its model and its data."""

    def write(more: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(f"model: {checkpoint}\ndata: {stream}\n{more}")
        return path

    return write


@pytest.fixture
def own_stream(stream: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stream, tmp_path / "stream"))


# ---------------------------------------------------------------------- plugins


def test_unknown_plugin(refused: Callable[..., str], train: list[object]) -> None:
    said = refused(*train, "--plugin", "spatra")
    assert "plugin 'spatra' is not installed (did you mean 'sparta'?)" in said
    assert "pip install graftwork-spatra" in said


def test_unknown_plugin_to_show(refused: Callable[..., str]) -> None:
    assert "did you mean 'sparta'?" in refused("plugins", "show", "sparto")


def test_a_plugin_whose_import_fails(
    refused: Callable[..., str],
    trainer: Callable[..., Any],
    install: Callable[..., None],
    train: list[object],
) -> None:
    install("torn", "torn_plugin", "import a_module_that_is_not_there")
    said = refused(*train, "--plugin", "torn", hint=True)
    assert "plugin 'torn' (package graftwork-torn 1.0) cannot be imported" in said
    assert "No module named 'a_module_that_is_not_there'" in said
    outcome = trainer("--debug", *train, "--plugin", "torn")
    assert outcome.code == 2
    assert "Traceback (most recent call last)" in outcome.err
    assert "torn_plugin.py" in outcome.err
    assert HINT not in outcome.err


def test_an_installed_plugin_that_is_broken_harms_nobody_else(
    trainer: Callable[..., Any], install: Callable[..., None]
) -> None:
    install("torn", "torn_plugin2", "raise RuntimeError")
    outcome = trainer("plugins", "list")
    assert outcome.code == 0
    assert "torn" in outcome.out
    assert trainer("plugins", "show", "sparta").code == 0


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("rank_sharde=1", "plugin 'sparta': unknown option 'rank_sharde' (did you mean 'rank_shared'?)"),
        ("lambda_orth=-1", "option 'lambda_orth' = -1: input should be greater than or equal to 0"),
        ("dropout=1", "option 'dropout' = 1: input should be less than 1"),
        ("router=yes", "option 'router'"),
        ("rank_shared=8", "rank_specific = 8 must be larger than rank_shared = 8"),
    ],
)
def test_bad_plugin_options(refused: Callable[..., str], train: list[object], option: str, said: str) -> None:
    assert said in refused(*train, "--plugin", "sparta", "--set", f"plugins.sparta.{option}")


# ---------------------------------------------------------------------- recipes


def test_unknown_recipe_key(refused: Callable[..., str], recipe: Callable[[str], Path]) -> None:
    path = recipe("evalute:\n  cells: all\n")
    assert f"{path}:3: unknown key 'evalute' (did you mean 'evaluate'?)" in refused("run", path)


def test_unknown_nested_recipe_key(refused: Callable[..., str], recipe: Callable[[str], Path]) -> None:
    path = recipe("evaluate:\n  cells: all\n  bach_size: 2\n")
    said = refused("run", path)
    assert f"{path}:5" in said
    assert "'evaluate.bach_size' (did you mean 'batch_size'?)" in said


def test_bad_plugin_option_in_a_recipe_names_the_file(
    refused: Callable[..., str], recipe: Callable[[str], Path]
) -> None:
    path = recipe("plugins:\n  sparta:\n    scael: 2\n")
    said = refused("run", path)
    assert str(path) in said
    assert "unknown option 'scael' (did you mean 'scale'?)" in said


def test_yaml_syntax_error(refused: Callable[..., str], recipe: Callable[[str], Path]) -> None:
    path = recipe("train: {max_steps: 2\nseed: 1\n")
    assert f"{path}:4: not valid YAML" in refused("run", path)


def test_missing_recipe(refused: Callable[..., str]) -> None:
    assert "recipe file 'nowhere.yaml' does not exist" in refused("run", "nowhere.yaml")


def test_a_recipe_that_a_plugin_does_not_ship(refused: Callable[..., str]) -> None:
    said = refused("run", "sparta:clam")
    assert "ships no recipe 'clam' (did you mean 'claim'?)" in said
    assert "sparta:claim" in said


@pytest.mark.parametrize(("flag", "known"), [("--size", "tiny"), ("--step", "plain")])
def test_unknown_size_and_step(
    refused: Callable[..., str], recipe: Callable[[str], Path], flag: str, known: str
) -> None:
    path = recipe("sizes:\n  tiny: {}\nsteps:\n  - name: plain\n")
    said = refused("run", path, flag, known + "x")
    assert f"no {flag[2:]} '{known}x' (did you mean '{known}'?)" in said


def test_a_claim_about_an_arm_that_is_not_there(
    refused: Callable[..., str], recipe: Callable[[str], Path]
) -> None:
    path = recipe("steps:\n  - name: plain\nexpect:\n  - plane.forgetting < plain.forgetting\n")
    assert "plane" in refused("run", path)


# ---------------------------------------------------------------------- data


def test_missing_data(refused: Callable[..., str], train: list[object]) -> None:
    assert "data 'nowhere' does not exist" in refused(*train, "--data", "nowhere")


def test_broken_json_line(refused: Callable[..., str], train: list[object], tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": \n')
    assert f"{path}:2: not valid JSON" in refused(*train, "--data", path)


def test_broken_json_in_a_task_folder(
    refused: Callable[..., str], train: list[object], own_stream: Path
) -> None:
    path = own_stream / "G0/fruit/test.json"
    path.write_text(path.read_text()[:-5])
    assert f"{path}: not valid JSON" in refused(*train, "--data", own_stream)


def test_empty_task(refused: Callable[..., str], train: list[object], own_stream: Path) -> None:
    path = own_stream / "G0/fruit/train.json"
    path.write_text("[]")
    assert f"{path}: no items" in refused(*train, "--data", own_stream)
    empty = own_stream.parent / "empty.jsonl"
    empty.touch()
    assert f"{empty}: no items" in refused(*train, "--data", empty)


def test_unknown_label(refused: Callable[..., str], train: list[object], own_stream: Path) -> None:
    path = own_stream / "G0/fruit/train.json"
    items = json.loads(path.read_text())
    items[3]["label"] = "appel"
    path.write_text(json.dumps(items))
    said = refused(*train, "--data", own_stream)
    assert (
        f"{path}, item 3: the label 'appel' is not one of the task's labels (did you mean 'apple'?)" in said
    )


def test_unknown_task_in_the_order(refused: Callable[..., str], train: list[object]) -> None:
    said = refused(*train, "--set", "data.order=[fruit, color]")
    assert "the task 'color'" in said
    assert "did you mean 'colour'?" in said


# ---------------------------------------------------------------------- models


@pytest.fixture
def own_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def test_missing_model(refused: Callable[..., str], train: list[object]) -> None:
    assert "model './nowhere' does not exist" in refused(*train, "--model", "./nowhere")


def test_unknown_hub_model(
    refused: Callable[..., str], train: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refused(*train, "--model", "graftwork-nobody/nothing", hint=True)
    assert (
        "model 'graftwork-nobody/nothing' is not in the cache, and HF_HUB_OFFLINE keeps from the network"
        in said
    )


def test_model_folder_without_weights(
    refused: Callable[..., str], train: list[object], own_checkpoint: Path
) -> None:
    (own_checkpoint / "model.safetensors").unlink()
    assert f"model folder '{own_checkpoint}' has no weights" in refused(*train, "--model", own_checkpoint)
    (own_checkpoint / "config.json").unlink()
    assert "has no config.json" in refused(*train, "--model", own_checkpoint)


def test_pickled_weights_are_refused_and_never_read(
    refused: Callable[..., str], train: list[object], own_checkpoint: Path, tmp_path: Path
) -> None:
    """The pickle here would write a file if anybody opened it; ``refused`` looks for one."""
    import pickle

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "opened",))

    (own_checkpoint / "model.safetensors").unlink()
    (own_checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    for words in (
        [*train, "--model", own_checkpoint],
        ["generate", "--model", own_checkpoint, "--prompt", "hello"],
        ["evaluate", "--model", own_checkpoint, "--text", own_checkpoint / "config.json"],
    ):
        assert "only as a pickle (pytorch_model.bin)" in refused(*words)


def test_damaged_weights(refused: Callable[..., str], own_checkpoint: Path) -> None:
    file = own_checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    said = refused("generate", "--model", own_checkpoint, "--prompt", "hello", hint=True)
    assert f"model '{own_checkpoint}'" in said
    assert "damaged" in said


@pytest.mark.parametrize("named", [True, False])
def test_an_adapter_of_an_unknown_method(
    refused: Callable[..., str], checkpoint: Path, tmp_path: Path, named: bool
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "SORCERY", "base_model_name_or_path": str(checkpoint)}
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, **({"graftwork_plugin": "sorcery"} if named else {})})
    )
    (folder / "adapter_model.safetensors").touch()
    said = refused("generate", "--model", folder, "--prompt", "hello")
    assert "is of the method SORCERY" in said
    assert ("`pip install graftwork-sorcery`" if named else "with --plugin") in said


# ---------------------------------------------------------------------- settings and flags


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.lerning_rate=1", "has no field 'lerning_rate' (did you mean 'learning_rate'?)"),
        ("train.max_steps=many", "train.max_steps = 'many'"),
        ("train.output_dir=x", "train.output_dir is decided by"),
        ("seed=-1", "'seed' = -1: input should be greater than or equal to 0"),
        ("seed=soon", "'seed' = 'soon'"),
        ("evaluate.cells=some", "'evaluate.cells' = 'some'"),
        ("trian.max_steps=1", "unknown key 'trian' (did you mean 'train'?)"),
        ("max_steps", "write it as dotted.key=value"),
        ("adapter.peft_type=LORRA", "did you mean 'LORA'?"),
    ],
)
def test_bad_settings(refused: Callable[..., str], train: list[object], setting: str, said: str) -> None:
    assert said in refused(*train, "--set", setting)


@pytest.mark.parametrize(
    ("written", "value"),
    [("no", "no"), ("off", "off"), ("true", True), ("1e-4", 1e-4), ("-2E3", -2000.0), ("1e", "1e"), ("7", 7)],
)
def test_words_and_numbers_of_a_setting_are_what_they_look_like(written: str, value: object) -> None:
    assert parse_value(written) == value
    assert type(parse_value(written)) is type(value)


def test_resume_without_output(refused: Callable[..., str], checkpoint: Path, stream: Path) -> None:
    said = refused("train", "--model", checkpoint, "--data", stream, "--resume", *FAST_SETS)
    assert "--resume needs --output" in said


def test_missing_flag(refused: Callable[..., str], checkpoint: Path) -> None:
    said = refused("train", "--model", checkpoint)
    assert "--data" in said
    assert "trainer train --help" in said


def test_unknown_flag_and_verb(refused: Callable[..., str]) -> None:
    assert "--modle" in refused("generate", "--modle", "x")
    assert "'trian'" in refused("trian")


def test_evaluate_without_data(refused: Callable[..., str], checkpoint: Path) -> None:
    assert "evaluate needs --data" in refused("evaluate", "--model", checkpoint)


def test_evaluate_with_a_missing_text(refused: Callable[..., str], checkpoint: Path) -> None:
    said = refused("evaluate", "--model", checkpoint, "--text", "nowhere.txt", "--output", "scores.json")
    assert "nowhere.txt" in said


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_generate_with_an_empty_prompt(refused: Callable[..., str], checkpoint: Path, prompt: str) -> None:
    assert "the prompt is empty" in refused("generate", "--model", checkpoint, "--prompt", prompt)


@pytest.mark.parametrize(
    ("setting", "said"),
    [("top_pp=0.9", "no option 'top_pp' (did you mean 'top_p'?)"), ("max_new_tokens=lots", "max_new_tokens")],
)
def test_generate_with_a_bad_option(
    refused: Callable[..., str], checkpoint: Path, setting: str, said: str
) -> None:
    assert said in refused("generate", "--model", checkpoint, "--prompt", "hello", "--set", setting)


def test_report_of_nothing(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "holds no finished run" in refused("report", tmp_path)


# ---------------------------------------------------------------------- what works


@pytest.fixture(scope="module")
def trained(checkpoint: Path, stream: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that was trained with sparta from the command line, and what it printed."""
    root = tmp_path_factory.mktemp("trained") / "run"
    words = ["train", "--model", str(checkpoint), "--data", str(stream), "--plugin", "sparta"]
    words += ["--set", "plugins.sparta.rank_specific=4", "--set", "plugins.sparta.block_layers=1"]
    words += ["--output", str(root), *FAST_SETS]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    return root, printed.getvalue()


@pytest.fixture
def run_folder(trained: tuple[Path, str]) -> Path:
    return trained[0]


def test_plugins_list(trainer: Callable[..., Any]) -> None:
    outcome = trainer("plugins", "list")
    assert outcome.code == 0
    rows = [line.split() for line in outcome.out.splitlines()]
    assert rows[0] == ["PLUGIN", "PACKAGE", "VERSION"]
    assert ["sparta", "graftwork-sparta", "0.1.0"] in rows


def test_plugins_show(trainer: Callable[..., Any]) -> None:
    outcome = trainer("plugins", "show", "sparta")
    assert outcome.code == 0
    assert "sparta  (graftwork-sparta 0.1.0)" in outcome.out
    for part in ("adapter_config, ", "sparta:claim", "lambda_orth", "weight of the overlap", "[>= 0]"):
        assert part in outcome.out


def test_train_writes_a_whole_run(trained: tuple[Path, str]) -> None:
    root, printed = trained
    result = json.loads((root / "result.json").read_text())
    assert result["order"] == ["colour", "fruit"]
    assert result["steps"] == 2
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["plugins"] == {"sparta": {"distribution": "graftwork-sparta", "version": "0.1.0"}}
    assert manifest["job"]["plugins"]["sparta"]["rank_specific"] == 4
    assert (root / "adapter/adapter_model.safetensors").stat().st_size > 0
    html = (root / "report.html").read_text()
    assert html.rstrip().endswith("</html>")
    logs = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    logs = [event for event in logs if event["event"] == "log"]
    assert [(event["task"], event["step"]) for event in logs] == [
        ("colour", 1),
        ("colour", 2),
        ("fruit", 1),
        ("fruit", 2),
    ]
    assert all({"loss/orth", "loss/components"} <= set(event) for event in logs)
    for word in ("colour", "fruit", str(root / "report.html"), str(root / "adapter")):
        assert word in printed


def test_report_prints_the_same_tables_again(trainer: Callable[..., Any], trained: tuple[Path, str]) -> None:
    root, printed = trained
    before = (root / "report.html").read_text()
    (root / "report.html").unlink()
    outcome = trainer("report", root)
    assert outcome.code == 0
    assert outcome.out == printed
    assert (root / "report.html").read_text() == before
    assert "|" in trainer("report", root, "--markdown").out


def test_evaluate_agrees_with_the_run(
    trainer: Callable[..., Any], run_folder: Path, stream: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    words = ["--model", run_folder, "--data", stream, "--text", text, "--plugin", "sparta"]
    outcome = trainer("evaluate", *words, "--output", "scores.json")
    assert outcome.code == 0, outcome.err
    scores = json.loads(Path("scores.json").read_text())
    final = json.loads((run_folder / "result.json").read_text())["scores"][-1]
    assert [row["accuracy"] for row in scores["tasks"]] == pytest.approx(final)
    assert scores["perplexity"]["perplexity"] > 1
    assert "colour" in outcome.out
    assert f"tokens of {text}" in outcome.out


def test_generate(trainer: Callable[..., Any], run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", "--model", run_folder, "--plugin", "sparta", "--set", "max_new_tokens=5"]
    first = trainer(*words, "--prompt", "Which fruit?")
    assert first.code == 0, first.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("Which fruit?"))
    assert trainer(*words, "--prompt", "-").out == first.out
    sampled = [*words, "--prompt", "Which fruit?", "--set", "do_sample=true", "--seed"]
    assert trainer(*sampled, 1).out == trainer(*sampled, 1).out
    assert trainer(*sampled, 1).out != trainer(*sampled, 2).out


def test_dry_run_reads_no_weights_and_writes_nothing(
    trainer: Callable[..., Any], recipe: Callable[[str], Path], own_checkpoint: Path, tmp_path: Path
) -> None:
    path = recipe(
        "train: {max_steps: 3}\nsteps:\n  - name: lora\n    adapter: {peft_type: LORA, r: 2}\n"
        "  - name: sparta\n    plugins: {sparta: {block_layers: 2}}\nexpect:\n  - sparta.forgetting < lora.forgetting\n"
    )
    (own_checkpoint / "model.safetensors").write_bytes(b"not weights")
    before = _contents(tmp_path)
    outcome = trainer("run", path, "--dry-run", "--set", f"model={own_checkpoint}")
    assert outcome.code == 0, outcome.err
    assert _contents(tmp_path) == before
    for part in ("lora", "sparta", "SPARTA, shared over tasks", "trainable", "SFTTrainer", "rank_specific=8"):
        assert part in outcome.out


@pytest.fixture
def claimed(recipe: Callable[[str], Path]) -> Callable[[str], Path]:
    def write(claim: str) -> Path:
        fields = "".join(f"  {field.replace('=', ': ')}\n" for field in (*FAST, "save_strategy=no"))
        return recipe(f"train:\n{fields}adapter: {{peft_type: LORA, r: 2}}\nexpect:\n  - {claim}\n")

    return write


@pytest.mark.parametrize(
    ("claim", "code"), [("train.trainable_parameters > 9", 0), ("train.trainable_parameters > 1e9", 1)]
)
def test_run_says_whether_the_claim_held(
    trainer: Callable[..., Any], claimed: Callable[[str], Path], claim: str, code: int
) -> None:
    outcome = trainer("run", claimed(claim))
    assert outcome.code == code, outcome.err
    assert claim in outcome.out
    assert ("refuted" if code else "held") in outcome.out
    assert (Path("runs/last") / "results.json").exists()


def test_help_of_every_verb(trainer: Callable[..., Any]) -> None:
    for words in ([], ["train"], ["run"], ["evaluate"], ["generate"], ["report"], ["plugins", "show"]):
        outcome = trainer(*words, "--help")
        assert outcome.code == 0
        assert outcome.out.startswith("Usage: trainer")
