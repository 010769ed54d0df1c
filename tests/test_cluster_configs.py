"""The configs for 8 GPUs, several boxes and offloading: each parsed by what reads it, each shape dry-run."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from graftwork.card import hooks_of
from graftwork.plugins import discover, load_class
from graftwork.recipe import load
from graftwork.train.algorithms import algorithm, build_arguments
from graftwork.train.sharding import TRAINING
from graftwork.yaml_lines import read
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.run import parse_args

FOLDER = Path(__file__).parents[1] / "recipes/cluster"
TUNE = FOLDER / "tune.yaml"
ACCELERATE = {"one-box": (1, 8), "nodes": (2, 16)}
SHAPES = {
    "one-box": (8, "8 GPUs, nothing sharded"),
    "one-box-fsdp2": (8, "8 GPUs, FSDP2: optimizer state, gradients, weights sharded"),
    "nodes": (16, "16 GPUs, FSDP2: optimizer state, gradients, weights sharded"),
    "offload": (
        2,
        "2 GPUs, ZeRO stage 3: optimizer state, gradients, weights sharded; optimizer state and gradients, weights "
        "offloaded",
    ),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, and no launcher."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_every_shape_is_tried() -> None:
    assert set(read(TUNE).data["sizes"]) == {*SHAPES, "smoke"}
    assert {path.stem for path in (FOLDER / "accelerate").glob("*.yaml")} == set(ACCELERATE)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_planned(shape: str, trainer: Callable[..., Any]) -> None:
    gpus, sharded = SHAPES[shape]
    outcome = trainer("run", TUNE, "--size", shape, "--dry-run", "--gpus", gpus)
    assert outcome.code == 0, outcome.err
    assert f"an estimate: {sharded};" in outcome.out
    # The step is the same in every shape, so that the learning rate may be.
    assert "128 items a step: 2 x" in outcome.out


def test_memory_falls_where_more_is_divided(trainer: Callable[..., Any]) -> None:
    memory = {}
    for shape, (gpus, _) in SHAPES.items():
        out = trainer("run", TUNE, "--size", shape, "--dry-run", "--gpus", gpus).out
        memory[shape] = float(re.findall(r"memory +about ([\d.]+) GiB per GPU", out)[0])
    assert memory["nodes"] < memory["one-box-fsdp2"]
    assert memory["offload"] < memory["nodes"]
    # All weights of 7 billion parameters with Adam, undivided.
    assert memory["one-box-fsdp2"] < 12 * 6.7 / 1.1


@pytest.mark.slow
def test_the_smoke_size_runs(trainer: Callable[..., Any], tmp_path: Path) -> None:
    outcome = trainer("run", TUNE, "--size", "smoke", "--output", tmp_path / "run")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_reads_its_configs(name: str) -> None:
    """Processes only: what is sharded is the recipe's, which a configuration of accelerate's would hide."""
    path = FOLDER / f"accelerate/{name}.yaml"
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert (config.num_machines, config.num_processes) == ACCELERATE[name]
    assert config.distributed_type == DistributedType.MULTI_GPU
    assert not config.fsdp_config
    assert not config.deepspeed_config
    words = ["--config_file", str(path), "-m", "graftwork", "run", "recipe.yaml", "--size", "nodes"]
    asked = launch_command_parser().parse_args(words)
    assert asked.module
    assert [asked.training_script, *asked.training_script_args] == words[3:]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("fsdp2*.json")), ids=lambda path: path.stem)
def test_the_trainer_reads_fsdp_configs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers and accelerate write what they read into the environment.
    for name in ("FSDP_VERSION", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "false")
    config = algorithm("sft").config
    fields = {"fsdp": True, "fsdp_config": str(path)}
    arguments: Any = build_arguments(config, fields, output_dir=str(tmp_path), seed=0)
    plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert isinstance(plugin.cpu_offload, CPUOffloadPolicy) == ("offload" in path.stem)
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed; `make slow` brings it",
)
def test_deepspeed_s_config_is_filled_from_the_recipe(tmp_path: Path) -> None:
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    job = load(TUNE, size="offload").jobs[0].job
    try:
        read_as = HfTrainerDeepSpeedConfig(json.loads(Path(job.train["deepspeed"]).read_text()))
        chosen = {key: value for key, value in job.train.items() if key not in ("deepspeed", "bf16")}
        arguments = build_arguments(algorithm("sft").config, chosen, output_dir=str(tmp_path), seed=0)
        arguments.bf16 = True
        read_as.trainer_config_process(arguments)
    finally:
        unset_hf_deepspeed_config()
    assert read_as.is_zero3()
    assert read_as.is_offload()
    assert read_as.config["bf16"]["enabled"] is True
    assert read_as.config["train_micro_batch_size_per_gpu"] == 2
    assert read_as.config["gradient_accumulation_steps"] == 32


def test_torchrun_reads_the_slurm_script() -> None:
    path = FOLDER / "nodes.sbatch"
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    text = path.read_text().replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith("srun ")]
    for name, value in {
        "$SLURM_NNODES": "2",
        "$SLURM_JOB_ID": "7",
        "$head": "a",
        '"$@"': "tune.yaml",
    }.items():
        line = line.replace(name, value)
    asked = parse_args(shlex.split(line)[2:])
    assert (asked.nnodes, asked.nproc_per_node, asked.rdzv_backend) == ("2", "8", "c10d")
    assert asked.module
    assert [asked.training_script, *asked.training_script_args] == ["graftwork", "run", "tune.yaml"]


@pytest.mark.parametrize(
    "place", ["README.md", "tune.yaml", "accelerate/one-box.yaml", "accelerate/nodes.yaml"]
)
def test_what_is_to_be_typed_names_what_is_there(place: str) -> None:
    text = (FOLDER / place).read_text()
    named = set(re.findall(r"recipes/cluster/[\w./-]+", text))
    assert named or place == "README.md"
    for path in named:
        assert (FOLDER.parents[1] / path.rstrip(".")).exists(), path
    for size in re.findall(r"--size ([\w-]+)", text):
        assert size in SHAPES


def test_the_table_of_what_is_equal_is_what_plugins_declare() -> None:
    rows = [
        line.split("|")[1:-1] for line in (FOLDER / "README.md").read_text().splitlines() if line[:3] == "| `"
    ]
    told = {}
    for names, *cells in rows:
        ddp, *sharded = [cell.strip() for cell in cells]
        assert ddp == "yes"
        kinds = {
            kind for kind, cell in zip(("zero2", "zero3", "fsdp2"), sharded, strict=True) if cell[:3] == "yes"
        }
        told |= dict.fromkeys(re.findall(r"`([a-z-]+)`", names.replace("`loss_term`", "")), kinds)
    training = [name for name in discover() if set(hooks_of(load_class(name))) & set(TRAINING)]
    assert told == {name: getattr(load_class(name), "sharding", set()) for name in training}
