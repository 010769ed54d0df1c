"""A tiny checkpoint and a tiny stream, made once, and what the methods' tests have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.testing.data import tiny_stream
from graftwork.testing.models import tiny_checkpoint, tiny_model
from graftwork.testing.runs import run_tiny
from graftwork.train.checkpoints import MarkCheckpoints
from graftwork.train.stream import Stream
from peft import LoraConfig, PeftModel, get_peft_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stream(tmp_path_factory.mktemp("data") / "stream", ["fruit", "metal"], train=16, test=2)


@pytest.fixture(scope="session")
def stacked() -> Callable[..., PeftModel]:
    """A tiny model with some adapters of rank 2, all active, the last one training, B not zero where asked."""

    def make(adapters: int = 3, *, targets: Any = ("q_proj", "down_proj"), moved: bool = False) -> PeftModel:
        names = [f"t{index}" for index in range(adapters)]
        model: Any = tiny_model()
        for number, name in enumerate(names):
            torch.manual_seed(number)
            config = LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), task_type="CAUSAL_LM")
            if number == 0:
                model = get_peft_model(model, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        model.base_model.set_adapter(names)
        for name in names:
            model.set_requires_grad(name, name == names[-1])
        if moved:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.1)
        return model

    return make


@pytest.fixture(scope="session")
def logged() -> Callable[[Path], list[dict[str, Any]]]:
    """The logged steps of a run, without TRL's count of tokens, which starts again in a resumed one."""

    def read(directory: Path) -> list[dict[str, Any]]:
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        events = [event for event in map(json.loads, lines) if event["event"] == "log"]
        return [{key: value for key, value in event.items() if key != "num_tokens"} for event in events]

    return read


@pytest.fixture
def resumes_exactly(
    tmp_path: Path, logged: Callable[[Path], list[dict[str, Any]]]
) -> Callable[[Any, str | None], Path]:
    """Run a recipe (with checkpoints) whole, cut between its two tasks, and cut inside the second: same bits.

    Returns the folder of the whole run.
    """

    def compare(recipe: Any, plugin: str | None) -> Path:
        whole, between, inside = (tmp_path / name for name in ("whole", "between", "inside"))
        expected = run_tiny(recipe, whole)
        with pytest.MonkeyPatch.context() as patch:
            original = Stream._learn
            patch.setattr(Stream, "_learn", lambda self, task: _cut(task.index == 1, original, self, task))
            with pytest.raises(KeyboardInterrupt):
                run_tiny(recipe, between)
        with pytest.MonkeyPatch.context() as patch:
            saved = MarkCheckpoints.on_save

            def on_save(self: Any, *args: Any, **kwargs: Any) -> None:
                saved(self, *args, **kwargs)
                _cut(self.so_far()["task"] == "metal")

            patch.setattr(MarkCheckpoints, "on_save", on_save)
            with pytest.raises(KeyboardInterrupt):
                run_tiny(recipe, inside)
        assert list((inside / "stages/current").glob("checkpoint-*"))
        for folder in (between, inside):
            result = run_tiny(recipe, folder, resume=True)
            assert logged(folder) == logged(whole)
            assert result["scores"] == expected["scores"]
            assert result["charts"] == expected["charts"]
            files = [*whole.glob("adapter/*.safetensors"), *whole.glob("model/*.safetensors")]
            if plugin is not None:
                files += sorted(whole.glob(f"stages/*/plugins/{plugin}.safetensors"))
            assert files
            for file in files:
                assert (folder / file.relative_to(whole)).read_bytes() == file.read_bytes()
        return whole

    return compare


@pytest.fixture
def resumes_with_term(
    resumes_exactly: Callable[[Any, str | None], Path], logged: Callable[[Path], list[dict[str, Any]]]
) -> Callable[..., Path]:
    """``resumes_with_term(recipe, plugin, term, rounding=0)``: as above, for tasks of three logged steps.

    The loss term is absent in the first task, zero up to ``rounding`` at the start of the second, then above it.
    """

    def compare(recipe: Any, plugin: str | None, term: str, rounding: float = 0.0) -> Path:
        whole = resumes_exactly(recipe, plugin)
        logs = logged(whole)
        assert len(logs) == 6
        assert not any(f"loss/{term}" in log for log in logs[:3])
        assert abs(logs[3][f"loss/{term}"]) <= rounding
        assert all(log[f"loss/{term}"] > rounding for log in logs[4:])
        return whole

    return compare


def _cut(now: bool, otherwise: Callable[..., Any] = lambda *_: None, *args: Any) -> Any:
    if now:
        raise KeyboardInterrupt
    return otherwise(*args)
