"""A model that DeepSpeed ZeRO-3 has partitioned over two processes on the CPU comes out as one read from its files."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from graftwork.testing.models import tiny_checkpoint
from graftwork.testing.packages import install_plugin
from graftwork.testing.runs import call_trainer, trainer_command
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason="DeepSpeed is not installed; `make slow` brings it",
    ),
]
RECIPES = Path(__file__).parent.parent / "recipes/deepspeed"
LAYERS = 4
SETTINGS = {
    "calibration": "random",
    "window": 24,
    # Batches of 2, 2, 2 and 1, and of 2, 2 and 1: the processes have different numbers of them.
    "samples": 7,
    "evaluation": "random",
    "evaluation_window": 20,
    "evaluation_windows": 5,
    "batch_size": 2,
    "score_calibration": "true",
}
# Rounds on statistics of all windows, then learns from all of them, one after the other.
CODE = """
import torch
from graftwork import hookimpl
from graftwork.distributed import rank_and_world
from graftwork.hookspecs import WeightTransform
from graftwork.transform.feedback import round_with_feedback
from graftwork.transform.scheme import WeightScheme
from pydantic import BaseModel, ConfigDict

class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    fault: str = "none"

class Plugin:
    Options = Options

    def __init__(self, options):
        self.fault = options.fault

    @hookimpl
    def weight_transforms(self, run):
        return [WeightTransform("feedback", self.block, dense=True)]

    def block(self, block):
        rank, _ = rank_and_world()
        linears = block.linears()
        moments = block.second_moments(list(linears))
        for name, module in linears.items():
            rounded = round_with_feedback(module.weight.detach(), moments[name], WeightScheme(bits=4), name=name)
            block.round(name, rounded)
        norm = block.module.input_layernorm.weight
        norm.requires_grad_(True)
        for hidden, kwargs, target in block.dense_batches():
            loss = (block.run(hidden, kwargs) - target).square().mean()
            (gradient,) = torch.autograd.grad(loss, norm)
            norm.data.add_(gradient, alpha=-0.1)
        seen = sum(hidden.shape[0] * hidden.shape[1] for hidden, _ in block.batches())
        share = sum(hidden.shape[0] * hidden.shape[1] for hidden, _ in block.batches(share=True))
        assert seen == block.tokens == 7 * 24
        assert block.reduced(torch.tensor(share), torch.add) == seen
        if block.index == 1 and self.fault == "apart":
            norm.data.add_(rank)
        if block.index == 1 and self.fault == "fails" and rank == 1:
            raise ValueError("broken on purpose")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    install_plugin(folder, "feedback", "feedbackround:Plugin", CODE)
    return folder


@pytest.fixture(scope="module")
def call(
    model: Path, site: Path, extensions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """Return a function that transforms the model under DeepSpeed in two processes, or starts to (``start``)."""
    # Likelihoods of the unchanged model are not taken over from another test.
    cache = tmp_path_factory.mktemp("partitioned")

    def given(
        output: Path,
        *flags: str,
        of: Path = model,
        plugin: str = "feedback",
        config: Any = None,
        start: bool = False,
    ) -> Any:
        env = {
            "TORCH_EXTENSIONS_DIR": str(extensions),
            "PYTHONPATH": str(site),
            "GRAFTWORK_CACHE": str(cache),
        }
        config = config or RECIPES / "zero3-transform-cpu.json"
        arguments = [*words(of, output, plugin), f"--set=transform.deepspeed={config}", *flags]
        if not start:
            return call_trainer(arguments, processes=2, env=env)
        return subprocess.Popen(
            trainer_command(arguments, 2),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )

    return given


def words(model: Path, output: Path, plugin: str) -> list[str]:
    sets = [f"--set=transform.{key}={value}" for key, value in SETTINGS.items()]
    return ["transform", f"--model={model}", f"--plugin={plugin}", *sets, f"--output={output}"]


@pytest.fixture(scope="module")
def undisturbed(call: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    done = call(output)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report:") == 1
    return output


@pytest.fixture
def plain(trainer: Any, model: Path, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that transforms the model without DeepSpeed, in this process."""
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()

    def given(plugin: str = "feedback", of: Path = model) -> Path:
        outcome = trainer(*words(of, tmp_path / "plain", plugin))
        assert outcome.code == 0, outcome.err
        return tmp_path / "plain"

    return given


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "model").glob("*.safetensors"))
    return {key: value for file in files for key, value in load_file(file).items()}


def assert_same(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=1e-6)
    first, second = (json.loads((run / "result.json").read_text()) for run in (one, other))
    assert len(first["items"]["nll"]) == 5
    for items in ("nll", "delta_nll"):
        assert second["items"][items] == pytest.approx(first["items"][items], abs=1e-5)
    for metric in ("calibration_nll", "dense_perplexity", "layer_error", "bits_per_weight"):
        assert second["metrics"][metric] == pytest.approx(first["metrics"][metric], rel=1e-4)


def test_partitioned_in_memory_equals_plain(plain: Any, undisturbed: Path, model: Path) -> None:
    assert_same(plain(), undisturbed)
    # It is a change at all, and one that the windows of both processes had a say in.
    before, after = load_file(model / "model.safetensors"), weights(undisturbed)
    name = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(before[name], after[name])
    assert json.loads((undisturbed / "manifest.json").read_text())["world_size"] == 2
    assert not (undisturbed / "work").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("graftwork_compression_baselines") is None,
    reason="graftwork-compression-baselines is not installed",
)
def test_gptq_comes_out_the_same(plain: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    done = call(tmp_path / "partitioned", plugin="gptq")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(plain("gptq"), tmp_path / "partitioned")


def _aio() -> bool:
    if importlib.util.find_spec("deepspeed") is None:
        return False
    return bool(importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder().is_compatible())


def test_partitioned_on_nvme_equals_plain(plain: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    if not _aio():
        pytest.skip("DeepSpeed's aio operator needs libaio (Debian: libaio-dev)")
    # DeepSpeed leaves parts of less than 1 MiB in memory; half of an MLP's matrix has that much here.
    wide = tiny_checkpoint(tmp_path / "wide", hidden_size=512, intermediate_size=1024)
    config = json.loads((RECIPES / "zero3-transform-nvme.json").read_text())
    drive = tmp_path / "drive"
    (drive / ".graftwork-killed.part").mkdir(parents=True)
    config["zero_optimization"]["offload_param"]["nvme_path"] = str(drive)
    path = tmp_path / "nvme.json"
    path.write_text(json.dumps(config))
    process = call(tmp_path / "nvme", of=wide, config=path, start=True)
    swapped: set[str] = set()
    while process.poll() is None:
        # Files come and go.
        with contextlib.suppress(OSError):
            swapped |= {file.name for file in drive.rglob("*.swp") if file.stat().st_size == 2**20}
        time.sleep(0.01)
    assert process.returncode == 0
    assert_same(plain(of=wide), tmp_path / "nvme")
    assert swapped
    assert list(drive.iterdir()) == []


def test_killed_and_resumed_gives_the_same_bytes(
    call: Callable[..., Any], undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = call(output, start=True)
    progress = output / "work/progress.json"
    deadline = time.monotonic() + 600
    try:
        while not progress.is_file() or len(json.loads(progress.read_text())["records"]) < 2:
            assert process.poll() is None, "ended before it was to be killed"
            assert time.monotonic() < deadline, "was not ready to be killed in time"
            time.sleep(0.01)
    finally:
        # The launcher starts each process in a session of its own.
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for one in [process, *children]:
            one.kill()
        process.wait()
        psutil.wait_procs(children)
    assert not (output / "model").exists()
    done = call(output, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    names = sorted(path.name for path in (undisturbed / "model").iterdir())
    assert sorted(path.name for path in (output / "model").iterdir()) == names
    for name in names:
        assert (output / "model" / name).read_bytes() == (undisturbed / "model" / name).read_bytes(), name
    first, second = (json.loads((run / "result.json").read_text()) for run in (undisturbed, output))
    assert second["items"] == first["items"]


def test_a_layer_that_comes_out_differently_is_refused(call: Callable[..., Any], tmp_path: Path) -> None:
    done = call(tmp_path / "run", "--set=plugins.feedback.fault=apart")
    assert done.returncode != 0
    assert "'model.layers.1' was changed differently in the processes 0 and 1" in done.stderr
    assert not (tmp_path / "run/model").exists()


def test_one_process_that_fails_ends_all(call: Callable[..., Any], tmp_path: Path) -> None:
    done = call(tmp_path / "run", "--set=plugins.feedback.fault=fails")
    assert done.returncode != 0
    assert "plugin 'feedback' failed" in done.stderr
    assert "broken on purpose" in done.stderr
