"""``trainer transform`` as a user sees it: one sentence for bad input, the same bytes after a kill, all or nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.testing.models import tiny_checkpoint
from safetensors.torch import load_file, save_file

TEXT = "Weights are rounded one after another, and what is lost is made good by those that follow. " * 12
LAYERS = 6
Words = Callable[..., list[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=LAYERS)


@pytest.fixture
def words(model: Path, tmp_path: Path) -> Words:
    """Return the words of a short transform; keywords are further settings."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def given(
        output: Path, *flags: str, of: Path | str = model, plugin: str = "gptq", **settings: Any
    ) -> list[str]:
        options = {"calibration": text, "window": 32, "samples": 8, **settings}
        sets = [f"--set=transform.{key}={value}" for key, value in options.items() if value is not None]
        return ["transform", f"--model={of}", f"--plugin={plugin}", *sets, f"--output={output}", *flags]

    return given


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---------------------------------------------------------------------- what comes out


def test_a_folder_that_transformers_loads(trainer: Any, words: Words, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    outcome = trainer(*words(tmp_path / "run", evaluation="random", evaluation_window=32))
    assert outcome.code == 0, outcome.err
    assert "bits_per_weight" in outcome.out
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert set(result["metrics"]) >= {"perplexity", "dense_perplexity", "delta_nll", "layer_error", "size_mb"}
    layers = json.loads((tmp_path / "run/transform.json").read_text())["layers"]
    assert [layer["name"] for layer in layers] == [f"model.layers.{n}" for n in range(LAYERS)]
    assert all(0 < layer["error"] < 1 for layer in layers)
    assert not (tmp_path / "run/work").exists()
    page = (tmp_path / "run/report.html").read_text()
    assert "error of each layer" in page
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert loaded.config.quantization_config.quant_method == "compressed-tensors"
    again = trainer("evaluate", "--model", str(tmp_path / "run"), "--text", str(tmp_path / "text.txt"))
    assert again.code == 0, again.err


def test_dry_run_says_what_it_needs(trainer: Any, words: Words, tmp_path: Path) -> None:
    outcome = trainer(*words(tmp_path / "run", "--dry-run"))
    assert outcome.code == 0, outcome.err
    assert "of memory" in outcome.out
    assert "hidden states" in outcome.out
    assert not (tmp_path / "run").exists()


def test_a_bound_on_memory_moves_hidden_states_to_disk(trainer: Any, words: Words, tmp_path: Path) -> None:
    free = trainer(*words(tmp_path / "free", "--dry-run", calibration="random", samples=40000))
    bound = trainer(
        *words(tmp_path / "bound", "--dry-run", calibration="random", samples=40000, memory="800MiB")
    )
    assert "in memory, batches of 4" in free.out
    assert "on disk, batches of 4" in bound.out


# ---------------------------------------------------------------------- cut off; kills are in faults/


def test_cut_off_between_model_and_result(
    trainer: Any, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is complete then; what is left to do is to say so."""
    from graftwork.transform import job

    assert trainer(*words(tmp_path / "whole")).code == 0

    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "measurement", cut)
        assert trainer(*words(tmp_path / "run")).code != 0
    assert (tmp_path / "run/model").is_dir()
    assert not (tmp_path / "run/result.json").exists()
    resumed = trainer(*words(tmp_path / "run", "--resume"))
    assert resumed.code == 0, resumed.err
    assert contents(tmp_path / "run/model") == contents(tmp_path / "whole/model")
    assert not (tmp_path / "run/work").exists()


def test_another_job_does_not_go_on_in_the_folder(trainer: Any, words: Words, tmp_path: Path) -> None:
    assert trainer(*words(tmp_path / "run")).code == 0
    refused = trainer(*words(tmp_path / "run", "--resume", samples=4))
    assert refused.code == 2
    assert "belongs to a run with other settings" in refused.err


def test_full_disk_in_the_middle(
    trainer: Any, words: Words, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, write = contents(model), os.fsync
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        outcome = trainer(*words(tmp_path / "run"))
    assert outcome.code == 2
    assert "cannot be written: the disk is full; make room there" in outcome.err
    assert not (tmp_path / "run/model").exists()
    assert contents(model) == before
    assert trainer(*words(tmp_path / "run", "--resume")).code == 0


def _mounted(folder: Path, size: str, script: str) -> subprocess.CompletedProcess[str]:
    """Run Python code where ``folder`` is a file system of ``size``."""
    mount = f"mount -t tmpfs -o size={size} tmpfs '{folder}' && exec '{sys.executable}' -c \"$0\""
    return subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, script],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(
    ("size", "sentence"), [("64k", "free and the run may need"), ("300k", "cannot be written")]
)
def test_small_file_system(words: Words, model: Path, tmp_path: Path, size: str, sentence: str) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if shutil.which("unshare") is None or _mounted(small, "64k", "print(1)").returncode:
        pytest.skip("a file system of its own cannot be mounted here (unshare)")
    checked = "" if size == "64k" else "limits.check_disk = lambda *_: None; "
    arguments = words(small / "run", samples=64, window=16, calibration="random")
    script = (
        f"import os; from graftwork.transform import limits; {checked}from graftwork.cli import main\n"
        f"try: main({arguments!r})\n"
        f"except SystemExit as end: print('code', end.code, os.path.exists({str(small / 'run/model')!r}))"
    )
    before = contents(model)
    outcome = _mounted(small, size, script)
    assert "code 2 False" in outcome.stdout, outcome.stderr
    assert sentence in outcome.stderr
    assert contents(model) == before


# ---------------------------------------------------------------------- bad input


def changed(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Return a copy of the checkpoint whose tensors went through ``change``."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _broken(name: str, model: Path, folder: Path) -> Path:
    down = "model.layers.2.mlp.down_proj.weight"
    if name == "nan":
        return changed(model, folder, lambda tensors: tensors[down].view(-1).__setitem__(3, float("nan")))
    if name == "lacking":
        return changed(model, folder, lambda tensors: tensors.pop(down))
    if name == "shape":
        return changed(
            model, folder, lambda tensors: tensors.update({down: tensors[down][:, :-1].contiguous()})
        )
    shutil.copytree(model, folder)
    weights = folder / "model.safetensors"
    if name == "shard":
        keys = load_file(weights)
        weights.rename(folder / "model-00001-of-00002.safetensors")
        where = {key: f"model-0000{1 + (key == down)}-of-00002.safetensors" for key in keys}
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif name == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif name == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif name == "header":
        weights.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    elif name == "quantised":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
        )
    return folder


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nan", "'model.layers.2.mlp.down_proj.weight' holds 1 values that are no numbers"),
        ("lacking", "lacks the tensor 'model.layers.2.mlp.down_proj.weight'"),
        ("shape", "has shape (32, 47), and its config wants (32, 48)"),
        ("shard", "lists 'model-00002-of-00002.safetensors', which is not there; 1 of 2 files are"),
        ("pickle", "has its weights only as a pickle (pytorch_model.bin)"),
        ("cut", "is damaged or no safetensors file"),
        ("header", "is damaged or no safetensors file"),
        ("quantised", "is quantised already (gptq)"),
    ],
)
def test_bad_checkpoints(
    trainer: Any, words: Words, model: Path, tmp_path: Path, name: str, sentence: str
) -> None:
    outcome = trainer(*words(tmp_path / "run", of=_broken(name, model, tmp_path / "bad")))
    assert outcome.code == 2, outcome.err
    assert sentence in outcome.err
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"window": 900, "samples": 1, "calibration": "{short}"}, "fewer than one window of 900"),
        ({"calibration": "missing.txt"}, "text file 'missing.txt' does not exist"),
        ({"calibration": None}, "looks at activations, and no calibration text is set"),
        ({"window": 2048}, "2048 tokens do not fit the model's window of"),
        ({"memory": "100MiB"}, "transform.memory=100MiB is too little"),
        ({"memory": "much"}, "'much' is no size; write it as 8GiB or 800MB"),
        ({"samples": 0}, "transform.samples"),
        ({"batch": 3}, "transform.batch"),
        ({"format": "gguf"}, "transform.format"),
        ({"evaluation": "{text}", "evaluation_window": 32}, "which would flatter the result"),
    ],
)
def test_bad_settings(
    trainer: Any, words: Words, tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    (tmp_path / "short.txt").write_text("too short")
    places = {"{short}": tmp_path / "short.txt", "{text}": tmp_path / "text.txt"}
    known = {
        key: places.get(value, value) if isinstance(value, str) else value for key, value in settings.items()
    }
    outcome = trainer(*words(tmp_path / "run", **known))
    assert outcome.code == 2, outcome.err
    assert sentence in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--set=plugins.gptq.group=7"], "group size 7 does not divide the 32 inputs"),
        (["--set=plugins.gptq.scheme=W9A16"], "9 bits are not to be had"),
        (["--set=plugins.gptq.scheme=four"], "is not of the form W4A16"),
        (["--plugin=rtn"], "gptq"),
    ],
)
def test_bad_rounding(trainer: Any, words: Words, tmp_path: Path, flags: list[str], sentence: str) -> None:
    outcome = trainer(*words(tmp_path / "run", *flags))
    assert outcome.code == 2, outcome.err
    assert sentence in outcome.err
    assert not (tmp_path / "run/model").exists()


def test_plugins_that_change_no_weights(trainer: Any, words: Words, tmp_path: Path) -> None:
    outcome = trainer(*words(tmp_path / "run", plugin="sparta"))
    assert outcome.code == 2
    assert "no plugin of this run transforms weights" in outcome.err


def test_an_adapter_is_merged_first(trainer: Any, words: Words, model: Path, tmp_path: Path) -> None:
    from graftwork.models import load_model
    from peft import LoraConfig, get_peft_model

    get_peft_model(load_model(str(model)), LoraConfig(r=2)).save_pretrained(str(tmp_path / "adapter"))
    outcome = trainer(*words(tmp_path / "run", of=tmp_path / "adapter"))
    assert outcome.code == 2
    assert "which is an adapter: it changes plain weights" in outcome.err
    assert "merge the adapter into its base model first" in outcome.err
