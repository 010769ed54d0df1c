"""Where plugins are tried: a tiny model, its experts, data, and the commands that train and transform it."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from graftwork.card import hooks_of
from graftwork.console import Console
from graftwork.errors import PluginError, UserError
from graftwork.evaluate.modes import evaluating
from graftwork.evaluate.perplexity import perplexity
from graftwork.merge.plugin import MergePlugin
from graftwork.models import load_model, load_tokenizer, resolve
from graftwork.plugins import Plugins, load_class
from graftwork.recipe import expand
from graftwork.run import Run
from graftwork.testing.composition.parts import Stage, stages_of, tiny_options
from graftwork.testing.composition.trail import Broken
from graftwork.testing.data import tiny_stream, tiny_sums
from graftwork.testing.experts import save_tiny, tiny_experts, tiny_lora_experts
from graftwork.testing.models import tiny_judge
from graftwork.testing.runs import TINY_TRAIN, losses
from graftwork.train.job import run_job
from graftwork.transform.calibration import read_windows
from graftwork.transform.job import run_transform
from graftwork.transform.options import TransformOptions
from graftwork.yaml_lines import Document

TEXTS = {
    "calibration": "random",
    "samples": 4,
    "window": 32,
    "evaluation": "random",
    "evaluation_window": 32,
    "batch_size": 4,
}
CLOSE = 1e-5
"""How far a model that is read again may be from the one that was in memory, in nats per token: the shapes of
batches differ, and with them the order of sums."""


class Workshop:
    """Makes what plugins need to be tried, runs their commands, and keeps what came out.

    Args:
        folder: for a base model, experts, data, and all runs.
        options: by plugin, in the place of :func:`graftwork.testing.composition.parts.tiny_options`. ``{folder}`` in
            an option is the folder, in which ``models/judge`` is a tiny model that scores answers.
    """

    def __init__(self, folder: Path, options: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.folder = folder
        self._given = dict(options or {})
        base, whole = tiny_experts(folder / "models", ("a", "b"), num_hidden_layers=4)
        self.base = str(base)
        self._experts = {self.base: [whole, tiny_lora_experts(folder / "models", base)]}
        tiny_judge(folder / "models/judge")
        self.stream = tiny_stream(folder / "stream", ("fruit", "colour"), train=16, test=4)
        self.sums = tiny_sums(folder / "sums", train=16, test=4)
        self.text = folder / "text.txt"
        self.text.write_text("The quick brown fox jumps over the lazy dog. " * 8, encoding="utf-8")
        self._written: dict[tuple[Any, ...], tuple[str, dict[str, Any]] | Exception] = {}
        self._stages: dict[str, list[Stage]] = {}
        self._options: dict[str, dict[str, Any]] = {}

    def options(self, name: str) -> dict[str, Any]:
        """Return the options with which a plugin is tried."""
        if name not in self._options:
            found = self._given[name] if name in self._given else tiny_options(name)
            self._options[name] = _placed(found, self.folder)
        return self._options[name]

    def stages(self, name: str) -> list[Stage]:
        """Return the commands in which a plugin takes part."""
        if name not in self._stages:
            found = stages_of(name)
            if len(found) > 1 and "train" in found and self._refuses_training(name):
                found.remove("train")
            self._stages[name] = found
        return self._stages[name]

    def _refuses_training(self, name: str) -> bool:
        """Whether a plugin that is for another command, too, takes part in training only with further options."""
        try:
            self.write("train", self.base, (name,))
        except UserError:
            return True
        except (PluginError, Broken):
            pass
        return False

    def words(self, name: str, stage: Stage) -> list[str]:
        """Return the command of a stage of one plugin, as ``trainer`` takes it, without ``--output``."""
        sets = _flat(f"plugins.{name}", self.options(name))
        if stage == "generate":
            questions = self.folder / "questions.jsonl"
            rows = [{"context": "Rome lies in France.", "question": f"Where is {n}?"} for n in range(12)]
            questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            sets.append("max_new_tokens=4")
            chosen = ["--input", str(questions), "--batch-size", "2"]
        elif stage == "train":
            settings = self._training((name,))
            settings["train"] = {**settings["train"], "save_strategy": "steps", "save_steps": 1}
            chosen = ["--data", str(settings.pop("data"))]
            sets += _flat("", settings)
        else:
            whole, adapters = self._experts_of(self.base)
            texts: dict[str, Any] = dict(TEXTS)
            if self._merges((name,)):
                _, numbers = self.write("transform", self.base, (name,))
                texts["experts"] = adapters if numbers["adapters"] else whole
            chosen = []
            sets += _flat("transform", texts)
        settings_words = [word for one in sets for word in ("--set", one)]
        return [stage, "--model", self.base, "--plugin", name, *chosen, *settings_words]

    def members(self, order: Sequence[str], stage: Stage) -> tuple[str, ...]:
        """Return those of some plugins that take part in a command, in their order."""
        return tuple(name for name in order if stage in self.stages(name))

    def offers(self, order: Sequence[str]) -> list[str]:
        """Return the benchmarks and data sources by name that the plugins bring."""
        job = expand(self.document({"data": "none"}, order)).jobs[0].job
        run = Run(Path(), job, Plugins.from_options(job.plugins))
        found = [f"data {name}" for name in run.plugins.data_sources(run)]
        for plugin, benchmarks in run.plugins.call("benchmarks", run=run):
            found += [f"{plugin}:{name}" for name in benchmarks]
        return found

    def document(self, settings: Mapping[str, Any], members: Sequence[str]) -> Document:
        """Return settings with these plugins as a recipe of one job."""
        plugins = {name: self.options(name) for name in members}
        return Document({"model": self.base, "plugins": plugins, **settings}, {}, "composition")

    def write(self, stage: Stage, model: str, members: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
        """Run a stage of some plugins once; return the folder of its model and what was measured."""
        key = (stage, model, members)
        if key not in self._written:
            folder = self.folder / "runs" / str(len(self._written))
            run = self._train if stage == "train" else self._transform
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    self._written[key] = str(folder), run(model, members, folder)
            except UserError as error:
                late = (folder / "manifest.json").exists()
                self._written[key] = Broken(f"refused only after it began: {error}") if late else error
            except PluginError as error:
                self._written[key] = error
            except Exception as error:
                self._written[key] = Broken(f"{stage}: {type(error).__name__}: {error}")
        found = self._written[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _train(self, model: str, members: tuple[str, ...], folder: Path) -> dict[str, Any]:
        spec = expand(self.document({"model": model, **self._training(members)}, members)).jobs[0]
        result = run_job(spec, folder, console=Console(enabled=False))
        found = losses(folder)
        if not found or not all(math.isfinite(loss) for _, _, loss in found):
            raise Broken(f"losses are not finite: {[loss for _, _, loss in found]}")
        before = math.log(result["general"]["after"]["perplexity"])
        tokenizer = load_tokenizer(str(folder))
        after = perplexity(load_model(str(folder)).eval(), tokenizer, self.text, window=64)["nll"]
        _same("trained", before, after)
        return {"losses": found, "trained": before}

    def _training(self, members: Sequence[str]) -> dict[str, Any]:
        """Return the settings of a training run but for model and plugins; self-play learns one task."""
        alone = any("self_play" in hooks_of(load_class(name)) for name in members)
        return {
            "data": str(self.sums if alone else self.stream),
            # Adam's first step is lr times the sign of each gradient; the second one shows the gradients' sizes.
            "train": {**TINY_TRAIN, "max_steps": 2},
            "evaluate": {
                "cells": "final",
                "max_new_tokens": 2,
                "interference": False,
                "general": {"text": str(self.text), "window": 64},
            },
        }

    def _transform(self, model: str, members: tuple[str, ...], folder: Path) -> dict[str, Any]:
        texts: dict[str, Any] = dict(TEXTS)
        only_adapters = False
        if not self._merges(members):
            result = self._transformed(model, members, folder, texts)
        else:
            whole, adapters = self._experts_of(model)
            try:
                result = self._transformed(model, members, folder, {**texts, "experts": whole})
            except UserError:
                if folder.exists():
                    raise
                # Some methods are for adapters only.
                only_adapters = True
                result = self._transformed(model, members, folder, {**texts, "experts": adapters})
        before = float(result["items"]["nll"][0])
        if not math.isfinite(before):
            raise Broken("the transformed model's log-likelihood is not finite")
        loaded = load_model(str(folder)).eval()
        options = TransformOptions.model_validate(texts)
        windows = read_windows(options, None, loaded.config, result["seed"]).evaluation[0]  # type: ignore[arg-type]
        with evaluating(loaded):
            logits = loaded(input_ids=windows[:1], use_cache=False).logits[0, :-1].float()
        _same("transformed", before, torch.nn.functional.cross_entropy(logits, windows[0, 1:]).item())
        return {"transformed": result["items"]["nll"], "adapters": only_adapters}

    def _experts_of(self, model: str) -> list[dict[str, str]]:
        """Return experts that were made from ``model``: whole models, and LoRA adapters."""
        if model not in self._experts:
            if resolve(model).adapter:
                # Refused, whatever the experts are.
                return self._experts[self.base]
            folder = self.folder / "models" / str(len(self._experts))
            adapters = tiny_lora_experts(folder, Path(resolve(model).path))
            merged = {}
            for name, ref in adapters.items():
                loaded = PeftModel.from_pretrained(load_model(model), ref).merge_and_unload()
                merged[name] = str(save_tiny(loaded, folder / name))
            self._experts[model] = [merged, adapters]
        return self._experts[model]

    def _transformed(
        self, model: str, members: tuple[str, ...], folder: Path, section: Mapping[str, Any]
    ) -> dict[str, Any]:
        settings = {"model": model, "data": "none", "transform": dict(section)}
        spec = expand(self.document(settings, members)).jobs[0]
        return run_transform(spec, folder, console=Console(enabled=False))

    def _merges(self, members: Sequence[str]) -> bool:
        return any(issubclass(load_class(name), MergePlugin) for name in members)


def _flat(prefix: str, settings: Mapping[str, Any]) -> list[str]:
    """Return settings as ``--set`` takes them, dotted."""
    found: list[str] = []
    for key, value in settings.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping) and value:
            found += _flat(name, value)
        else:
            found.append(f"{name}={json.dumps(value)}")
    return found


def _placed(value: Any, folder: Path) -> Any:
    """Return options with ``{folder}`` replaced by the folder in which ``models/judge`` and all else lie."""
    if isinstance(value, str):
        return value.replace("{folder}", str(folder))
    if isinstance(value, Mapping):
        return {key: _placed(one, folder) for key, one in value.items()}
    return [_placed(one, folder) for one in value] if isinstance(value, list) else value


def _same(what: str, before: float, after: float) -> None:
    if not abs(before - after) <= CLOSE:
        raise Broken(
            f"the {what} model had {before:.7f} nats per token, and {after:.7f} when it was read again"
        )
