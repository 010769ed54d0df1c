"""A plugin that was built against version 1.0 of the hooks keeps working: a wheel that is never built again."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.card import hooks_of
from graftwork.hookspecs import HOOKS_VERSION, GraftworkHooks, HookDeprecation, hookspec
from graftwork.plugins import Plugins, discover, load_class
from graftwork.testing.data import tiny_sums
from graftwork.testing.models import tiny_tokenizer
from graftwork.testing.runs import losses, run_tiny, tiny_recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent / "frozen"
VERSIONS = sorted(path.stem.removeprefix("surface-") for path in HERE.glob("surface-*.json"))
ALL = ["frozen-decoding", "frozen-pairs", "frozen-play", "frozen-training", "frozen-weights"]


def freezer() -> Any:
    spec = importlib.util.spec_from_file_location("freeze", HERE / "freeze.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def frozen_surface(version: str) -> dict[str, Any]:
    return json.loads((HERE / f"surface-{version}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=VERSIONS)
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The version of a wheel that was unpacked, as an installer does, and can be found; in this module only."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(HERE / f"graftwork_frozen-{request.param}-py3-none-any.whl") as file:
        file.extractall(site)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        importlib.invalidate_caches()
        yield request.param
    for name in [name for name in sys.modules if name.partition(".")[0] == "graftwork_frozen"]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def seen(wheel: str) -> Iterator[Callable[[str], list[Any]]]:
    """What the frozen plugins saw during this test, hook by hook."""
    frozen = importlib.import_module("graftwork_frozen")
    frozen.CALLS.clear()
    yield frozen.seen
    frozen.CALLS.clear()


# ---------------------------------------------------------------------- what is promised


def test_the_version_is_told_and_frozen(trainer: Callable[..., Any]) -> None:
    assert f"(hooks {HOOKS_VERSION})" in trainer("--version").out
    assert HOOKS_VERSION in VERSIONS, "run `make freeze`"


@pytest.mark.parametrize("version", VERSIONS)
def test_no_hook_argument_or_field_of_the_version_is_gone(version: str) -> None:
    before, now = frozen_surface(version), freezer().surface()
    assert before["version"] == version
    if version.partition(".")[0] != HOOKS_VERSION.partition(".")[0]:
        pytest.skip("an earlier major version")
    for part in ("hooks", "classes"):
        gone = [
            f"{name}.{word}"
            for name, words in before[part].items()
            for word in words
            if word not in now[part].get(name, [])
        ]
        assert gone == [], f"{part} of {version} that are gone; that needs a major step of HOOKS_VERSION"
        assert before[part].keys() <= now[part].keys()


def test_a_surface_without_something_is_noticed() -> None:
    """The test above can fail: it sees what is really there."""
    surface = freezer().surface()
    assert surface["hooks"]["loss_terms"] == ["run", "model"]
    assert surface["classes"]["LossTerm"] == ["name", "fn", "weight", "per"]


def test_the_wheel_implements_every_hook_of_its_version(wheel: str) -> None:
    hooks = frozen_surface(wheel)["hooks"]
    assert [name for name in discover() if name.startswith("frozen-")] == ALL
    implemented = {hook for name in ALL for hook in hooks_of(load_class(name))}
    assert implemented == set(hooks)


def test_what_is_frozen_is_not_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    module = freezer()
    before = module.wheel().read_bytes()
    assert module.main() == 2
    assert "are frozen" in capsys.readouterr().err
    assert module.wheel().read_bytes() == before


def test_the_wheel_is_what_its_source_says() -> None:
    """Whoever changes the source of a frozen version changes nothing, and is told."""
    source = HERE / "source/src"
    with zipfile.ZipFile(HERE / f"graftwork_frozen-{HOOKS_VERSION}-py3-none-any.whl") as file:
        for path in sorted(source.rglob("*.py")):
            kept = file.read(path.relative_to(source).as_posix()).decode()
            # By what it means: a later style of formatting is no other source.
            assert ast.dump(ast.parse(kept)) == ast.dump(ast.parse(path.read_text(encoding="utf-8"))), (
                path.name
            )


# ---------------------------------------------------------------------- what goes is deprecated first

OLD = """
import torch
from graftwork import hookimpl
from transformers import LogitsProcessor

class Only(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([3]), 0)

class Plugin:
    def __init__(self, options):
        pass

    @hookimpl
    def logits_processors(self, run, model):
        return [Only()]

    @hookimpl
    def before_forward(self, run):
        pass

    @hookimpl
    def faded(self, run):
        pass
"""


class Later(GraftworkHooks):
    """A later version: one hook is to go, and an argument of another."""

    @hookspec(warn_on_impl=HookDeprecation("use task_begin instead; it goes with hooks 2.0"))
    def faded(self, run: Any) -> None: ...

    @hookspec(
        warn_on_impl_args={"model": HookDeprecation("it goes with hooks 2.0; use run.job.model instead")}
    )
    def logits_processors(self, run: Any, model: Any) -> Any: ...


def test_who_uses_a_deprecated_hook_is_told_once_and_goes_on(
    install: Any, trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    install("old-style", "old_style", OLD)
    monkeypatch.setattr("graftwork.plugins.GraftworkHooks", Later)
    monkeypatch.setattr("graftwork.plugins._told", set())
    words = ("generate", "--model", checkpoint, "--prompt", "abc", "--no-stream", "--set", "max_new_tokens=2")
    with pytest.warns(HookDeprecation) as warned:
        done = trainer(*words, "--plugin", "old-style")
    assert done.code == 0, done.err
    assert done.out.strip() == tiny_tokenizer().decode([3, 3])
    told = [line for line in done.err.splitlines() if "deprecated" in line]
    assert told == [
        "plugin 'old-style' (package graftwork-old-style 1.0) implements the hook 'faded', which is deprecated: "
        "use task_begin instead; it goes with hooks 2.0",
        "plugin 'old-style' (package graftwork-old-style 1.0) takes the argument 'model' of the hook "
        "'logits_processors', which is deprecated: it goes with hooks 2.0; use run.job.model instead",
    ]
    # Developers are told by pluggy, with the place in their code.
    assert {Path(one.filename).name for one in warned} == {"old_style.py"}
    again = trainer(*words, "--plugin", "old-style")
    assert "deprecated" not in again.err


def test_who_uses_nothing_deprecated_is_told_nothing(
    install: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(
        "new-style", "new_style", OLD.replace("faded", "check").replace("(self, run, model)", "(self, run)")
    )
    monkeypatch.setattr("graftwork.plugins.GraftworkHooks", Later)
    plugins = Plugins.from_options({"new-style": {}})
    assert plugins.implements("logits_processors") == plugins.implements("check") == ["new-style"]
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------- what it does

TRAINING: dict[str, Any] = {
    "plugins": {"frozen-training": {}},
    "train": {"max_steps": 3, "frozen_factor": 0.5, "save_strategy": "steps", "save_steps": 2},
    "evaluate": {"cells": "final", "max_new_tokens": 2, "interference": False},
}


def test_training(seen: Any, checkpoint: Path, tmp_path: Path) -> None:
    settings = {**TRAINING, "plugins": {"frozen-training": {"interrupt": "two"}}}
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tiny_recipe(checkpoint, "frozen:anywhere", **settings), run)
    for path in run.glob("manifest.json"):
        # The same run, but for what stopped it.
        path.write_text(path.read_text().replace('"interrupt": "two"', '"interrupt": ""'))
    training = {**TRAINING, "plugins": {"frozen-training": {"interrupt": ""}}}
    result = run_tiny(tiny_recipe(checkpoint, "frozen:anywhere", **training), run, resume=True)

    assert len(seen("check")) == 2
    assert seen("data_sources") == ["anywhere"] * 2
    assert seen("task_stream") == [[("one", 12), ("two", 12)]] * 2
    assert seen("training_data") == [("one", 10), ("two", 10), ("two", 10)]
    assert seen("task_begin") == [("one", 8), ("two", 8), ("two", 8)]
    assert seen("task_end") == [("one", 3), ("two", 3)]
    assert set(seen("compute_loss")) == {0.5}
    assert (
        len(seen("loss_terms")) == len(seen("transform_gradients")) == len(seen("learning_rate_factors")) == 2
    )
    assert len(seen("batch_begin")) == 6
    assert all(shape[0] == 4 for shape in seen("batch_begin"))
    assert seen("load_state") == [1]
    assert 1 in seen("save_state")
    assert seen("charts") == [2]

    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    terms = [event["loss/frozen"] for event in events if event["event"] == "log"]
    assert len(terms) == 6
    assert min(terms) > 0
    moved = load_file(run / "adapter/adapter_model.safetensors")
    sizes = {
        part: max(value.abs().max().item() for name, value in moved.items() if f"{part}.lora_B" in name)
        for part in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    assert all(value.shape[0] == 2 for name, value in moved.items() if "lora_A" in name)
    assert sizes["q_proj"] == sizes["v_proj"] == 0
    assert sizes["k_proj"] == pytest.approx(1e-3)
    assert sizes["o_proj"] > 2e-3
    assert "Frozen tasks" in json.dumps(result["charts"])


def test_the_loss_is_that_of_its_trainer(seen: Any, checkpoint: Path, tmp_path: Path) -> None:
    found = []
    for factor in (1, 2):
        settings = {**TRAINING, "train": {"max_steps": 1, "frozen_factor": factor}}
        run_tiny(
            tiny_recipe(checkpoint, "frozen:anywhere", data_options={"order": ["one"]}, **settings),
            tmp_path / f"{factor}",
        )
        found.append(losses(tmp_path / f"{factor}")[0][2])
    assert set(seen("compute_loss")) == {1, 2}
    assert found[1] > 1.5 * found[0]


def test_it_may_refuse(seen: Any, checkpoint: Path, tmp_path: Path) -> None:
    settings = {**TRAINING, "plugins": {"frozen-training": {"refuse": True}}}
    with pytest.raises(UserError, match="'frozen-training' refuses"):
        run_tiny(tiny_recipe(checkpoint, "frozen:anywhere", **settings), tmp_path / "run")
    assert seen("check") == [None]
    assert seen("adapter_config") == []


def test_self_play(seen: Any, checkpoint: Path, tmp_path: Path) -> None:
    data = tiny_sums(tmp_path / "sums", train=8, test=2)
    plugin = {"iterations": 1, "writing": {"max_new_tokens": 3, "batch_size": 8}}
    recipe = tiny_recipe(
        checkpoint,
        data,
        plugins={"frozen-play": plugin},
        adapter={"peft_type": "LORA", "r": 2, "target_modules": "all-linear"},
        train={"max_steps": 2, "max_length": 64},
        evaluate=TRAINING["evaluate"],
    )
    run_tiny(recipe, tmp_path / "run")
    assert seen("self_play")
    assert seen("pair_loss") == [(1, 4), (1, 4)]
    logged = (tmp_path / "run/metrics.jsonl").read_text()
    assert "frozen/margin" in logged


def test_generation(seen: Any, trainer: Callable[..., Any], checkpoint: Path) -> None:
    from graftwork_frozen.decoding import TOKEN  # type: ignore[import-not-found]

    words = ("generate", "--model", checkpoint, "--prompt", "abc", "--set", "max_new_tokens=4")
    done = trainer(*words, "--plugin", "frozen-decoding", "--no-stream")
    assert done.code == 0, done.err
    assert done.out.strip() == tiny_tokenizer().decode([TOKEN] * 4)
    assert "frozen passes: 4" in done.err
    assert seen("logits_processors") == ["llama"]
    assert [step for step, *_ in seen("before_forward")] == [0, 1, 2, 3]
    assert [prefill for _, prefill, _ in seen("before_forward")] == [True, False, False, False]
    assert seen("generation_context") == ["entered", "left"]
    assert seen("generation_notes") == [4]


def test_a_pair_of_prompts(seen: Any, trainer: Callable[..., Any], checkpoint: Path) -> None:
    asked = (
        "generate",
        "--model",
        checkpoint,
        "--question",
        "who?",
        "--set",
        "max_new_tokens=6",
        "--no-stream",
    )
    templates = (
        "--set",
        "templates.with_context={context} {question}",
        "--set",
        "templates.without_context={question}",
    )
    paired = trainer(*asked, *templates, "--context", "somebody", "--plugin", "frozen-pairs")
    assert paired.code == 0, paired.err
    alone = trainer("generate", "--model", checkpoint, "--prompt", "who?", *asked[5:])
    assert alone.code == 0, alone.err
    assert seen("combiner") == ["llama"]
    assert paired.out == alone.out


def test_weights_and_a_benchmark(seen: Any, trainer: Callable[..., Any], checkpoint: Path) -> None:
    settings = {"calibration": "random", "samples": 4, "window": 16}
    words = [word for key, value in settings.items() for word in ("--set", f"transform.{key}={value}")]
    done = trainer(
        "transform", "--model", checkpoint, "--plugin", "frozen-weights", *words, "--output", "changed"
    )
    assert done.code == 0, done.err
    assert seen("weight_transforms")
    assert seen("transform") == [0, 1]
    assert seen("begin") == [None]
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (checkpoint, "changed/model")
    )
    for name, value in before.items():
        assert torch.equal(after[name], value * (2 if "down_proj" in name else 1)), name

    words = ["evaluate", "--model", "changed/model", "--benchmark", "frozen-weights:size"]
    measured = trainer(*words, "--set", "benchmark.items=5", "--output", "scores.json")
    assert measured.code == 0, measured.err
    assert seen("measure") == [5]
    result = json.loads(Path("scores.json").read_text())
    size = after["model.layers.0.mlp.down_proj.weight"].abs().mean().item()
    assert result["items"]["size"] == pytest.approx([size] * 5)
    assert result["metrics"]["items"] == 5
    assert "frozen measured" in json.dumps(result["notes"])
