"""Every recipe that is here or in an installed plugin: it expands, its largest size can be planned, it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import yaml_lines
from graftwork.plugins import discover
from graftwork.recipe import load
from graftwork.recipes import shipped
from graftwork.transform.deepspeed import inference_config

FOLDER = Path(__file__).parents[1] / "recipes"
OURS = sorted(FOLDER.glob("*/*.yaml"))
SHIPPED = sorted({path for info in discover().values() for path in shipped(info).values()})
RECIPES = {f"{path.parent.parent.name}/{path.stem}": path for path in (*OURS, *SHIPPED)}
STREAMS = {path.stem: path for path in OURS if path.parent.name == "continual"}
BASELINES = [
    "seq-lora",
    "inc-lora",
    "per-task",
    "mtl",
    "replay",
    "ewc",
    "lwf",
    "o-lora",
    "n-lora",
    "inf-lora",
]


def sizes(path: Path) -> list[str | None]:
    return list(yaml_lines.read(path).data.get("sizes") or {}) or [None]


def paper(path: Path) -> list[str]:
    return [size for size in sizes(path) if size and size.startswith("paper")]


PAPERS = [(name, size) for name, path in RECIPES.items() for size in paper(path)]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub, and no data of this machine."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("GRAFTWORK_DATA", raising=False)


def test_there_are_recipes_to_test() -> None:
    assert {"standard", "long", "trace"} == set(STREAMS)
    assert SHIPPED
    assert len(RECIPES) == len(OURS) + len(SHIPPED)


@pytest.mark.parametrize("name", RECIPES)
def test_every_size_expands(name: str) -> None:
    for size in sizes(RECIPES[name]):
        recipe = load(RECIPES[name], size=size)
        assert recipe.jobs
        folders = [spec.folder for spec in recipe.jobs]
        assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", STREAMS)
def test_every_method_is_an_arm_of_every_size(name: str) -> None:
    for size in sizes(STREAMS[name]):
        methods = ["parsp"] if size == "paper-t5" else ["sparta", "parsp"]
        # The short stream also says what the parts of a method do.
        parts = ["parsp-regions", "parsp-random"] if name == "standard" and size != "paper-t5" else []
        assert load(STREAMS[name], size=size).arms == [*BASELINES, *methods, *parts]


def test_the_orders_are_the_published_ones() -> None:
    """Orders 1 to 6 of the CL benchmark, and TRACE's own with its epochs."""
    orders = {}
    for name in ("standard", "long"):
        for size in ("paper", "paper-t5"):
            for spec in load(STREAMS[name], size=size).jobs:
                orders.setdefault(spec.variant.partition("order=")[2], set()).add(
                    " ".join(spec.job.data.order or []).lower()
                )
    assert orders == {
        "order-1": {"dbpedia amazon yahoo agnews"},
        "order-2": {"dbpedia amazon agnews yahoo"},
        "order-3": {"yahoo amazon agnews dbpedia"},
        "order-4": {"mnli cb wic copa qqp boolqa rte imdb yelp amazon sst-2 dbpedia agnews multirc yahoo"},
        "order-5": {"multirc boolqa wic mnli cb copa qqp rte imdb sst-2 dbpedia agnews yelp amazon yahoo"},
        "order-6": {"yelp amazon mnli cb copa qqp rte imdb sst-2 dbpedia agnews yahoo multirc boolqa wic"},
    }
    job = load(STREAMS["trace"], size="paper").jobs[0].job
    epochs = [job.per_task[task]["num_train_epochs"] for task in job.data.order or []]
    assert epochs == [5, 3, 7, 5, 3, 5, 5, 7]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), PAPERS)
def test_the_paper_s_size_can_be_planned_offline(name: str, size: str, trainer: Callable[..., Any]) -> None:
    outcome = trainer("run", RECIPES[name], "--size", size, "--dry-run", "--gpus", 8)
    assert outcome.code == 0, outcome.err
    jobs = load(RECIPES[name], size=size).jobs
    assert all(f"\n{spec.arm}\n" in outcome.out for spec in jobs)
    # What is only measured or transformed needs no optimizer's memory.
    trained = {spec.arm for spec in jobs if not spec.job.benchmark and spec.job.transform is None}
    assert outcome.out.count("per GPU (an estimate: 8 GPUs") == len(trained)
    assert "unknown" not in outcome.out


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_of_the_paper_s_size_is_planned_with_its_deepspeed_config(
    name: str, trainer: Callable[..., Any]
) -> None:
    """From another folder than the recipe's: the config is found beside the recipe."""
    outcome = trainer("run", STREAMS[name], "--size", "paper", "--dry-run", "--gpus", 8, "--step", "seq-lora")
    assert outcome.code == 0, outcome.err
    assert "8 GPUs, ZeRO stage 2: optimizer state, gradients sharded" in outcome.out


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "standard" else pytest.mark.slow) for name in STREAMS]
)
def test_the_smoke_size_runs(name: str, trainer: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = ["--size", "smoke", "--step", "seq-lora", "--step", "o-lora", "--output", output]
    outcome = trainer("run", STREAMS[name], *words)
    assert outcome.code == 0, outcome.err
    jobs = json.loads((output / "results.json").read_text())["jobs"]
    assert [job["name"] for job in jobs] == ["seq-lora", "o-lora"]
    assert all(set(job["metrics"]) >= {"ap", "bwt"} for job in jobs)
    assert jobs[0]["trainable_parameters"] == jobs[1]["trainable_parameters"]


DEEPSPEED = sorted((FOLDER / "deepspeed").glob("*.json"))
TRANSFORMING = [path for path in DEEPSPEED if "transform" in path.stem]


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.stem)
def test_deepspeed_configs_leave_the_recipe_s_fields_to_the_recipe(path: Path) -> None:
    """A config for training says `auto` where the recipe decides; one for transforming says nothing of training."""
    config = json.loads(path.read_text())
    training = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "bf16")
    wanted = dict.fromkeys(training, "auto") | {"bf16": {"enabled": "auto"}}
    found = {key: config[key] for key in training if key in config}
    assert found == ({} if path in TRANSFORMING else wanted)
    assert f"zero{config['zero_optimization']['stage']}" == path.stem.split("-")[0]


@pytest.mark.parametrize("path", TRANSFORMING, ids=lambda path: path.stem)
def test_deepspeed_configs_for_transforming_are_those_the_verb_reads(path: Path, tmp_path: Path) -> None:
    config = json.loads(path.read_text())
    offload = config["zero_optimization"]["offload_param"]
    if "nvme_path" in offload:
        offload["nvme_path"] = str(tmp_path)
    read = inference_config(config, torch.bfloat16, largest=1 << 20, processes=2)
    assert read["zero_optimization"]["stage"] == 3
    assert read["bf16"]["enabled"] is True
