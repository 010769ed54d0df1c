"""Two processes compute what one process computes with twice the batch, whatever is trained; sharded too.

The completions differ in length, so a mean over processes instead of over tokens would show. Sharded runs are slow:
``make slow`` installs DeepSpeed. FSDP2 runs on the CPU by :func:`graftwork.testing.distributed.shard_on_cpu`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch
from graftwork.card import hooks_of
from graftwork.models import load_chosen
from graftwork.plugins import discover, load_class
from graftwork.recipe import ModelOptions
from graftwork.testing.data import tiny_stream, tiny_sums
from graftwork.testing.distributed import Job, compare, compared, run
from graftwork.testing.models import tiny_checkpoint, tiny_judge
from graftwork.testing.packages import install_plugin
from graftwork.train.sharding import KINDS, TRAINING

RECIPES = Path(__file__).parent.parent / "recipes"
SHARDED = {
    "zero2": [f"train.deepspeed={RECIPES / 'deepspeed/zero2.json'}"],
    "zero3": [f"train.deepspeed={RECIPES / 'deepspeed/zero3.json'}"],
    "fsdp2": ["train.fsdp=true", f"train.fsdp_config={RECIPES / 'cluster/fsdp2.json'}"],
}
LORA = ["adapter.peft_type=LORA", "adapter.r=2", "adapter.target_modules=all-linear"]
COMMON = ["train.learning_rate=1e-2", "train.save_strategy=no", "evaluate.max_new_tokens=2"]
STREAM = [*COMMON, "train.max_steps=2", "train.gradient_accumulation_steps=2", "train.max_grad_norm=0.5"]
PLAY = [*COMMON, "train.max_steps=2", "train.max_length=64", "evaluate.batch_size=8"]
WRITING = ["writing.max_new_tokens=6", "writing.batch_size=2"]


class Arm(NamedTuple):
    """What is trained: options of the plugin (none where it is not one), further settings, digits of its terms."""

    plugin: str | None
    options: Sequence[str] = ()
    settings: Sequence[str] = ()
    plays: bool = False
    tied: bool = False
    tolerance: Mapping[str, float] | None = None


ARMS: dict[str, Arm] = {
    "lora": Arm(None, settings=LORA),
    "full": Arm(None),
    # Embedding and head are one weight, which is one where it is divided, too.
    "tied": Arm(None, tied=True),
    "sparta": Arm(
        "sparta",
        ["block_layers=1", "rank_specific=4", "components=2", "lambda_orth=0.5", "mu=0.2", "shared_lr=0.5"],
        ["train.max_steps=4"],
        # A difference of numbers close to one, squared.
        tolerance={"loss/components": 1e-2},
    ),
    "parsp": Arm("parsp", ["density=0.25"]),
    "parsp-gradient": Arm("parsp", ["density=0.25", "mode=gradient"]),
    "ewc": Arm("ewc", settings=LORA),
    # Distributions that are nearly the same: what is left of the logarithms' difference has few digits.
    "lwf": Arm("lwf", ["first_task=true"], LORA, tolerance={"loss/lwf": 1e-3}),
    "inf-lora": Arm("inf-lora", ["rank=2", "eps=0.6"]),
    "o-lora": Arm("o-lora", ["rank=2", "lambda_norm=0.1"]),
    "n-lora": Arm("n-lora", ["rank=2"]),
    "replay": Arm("replay", ["share=0.5"], LORA),
    "mtl": Arm("mtl", settings=LORA),
    "bdq": Arm("bdq", ["loss_term=true"], LORA),
    "tpaw": Arm("tpaw", ["iterations=2", "players=2", "rounds=2", *WRITING], LORA, plays=True),
    "spin": Arm("spin", ["iterations=2", *WRITING], LORA, plays=True),
    "iterative-dpo": Arm("iterative-dpo", ["iterations=2", "samples=2", *WRITING], LORA, plays=True),
    "continued-sft": Arm("continued-sft", ["iterations=2"], LORA, plays=True),
}
# What these reach is reached by others, too: `make slow` has them.
SELDOM = ("full", "tied", "parsp-gradient", "replay", "spin", "continued-sft")


@pytest.fixture(scope="module")
def make(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """Return what makes the job of an arm."""
    folder = tmp_path_factory.mktemp("data")
    stream = tiny_stream(folder / "stream", ("fruit", "colour"), train=16, test=4)
    sums = tiny_sums(folder / "sums", train=16, test=4)
    judge = tiny_judge(folder / "judge")
    models = {False: checkpoint, True: tiny_checkpoint(folder / "tied", tie_word_embeddings=True)}

    def job(name: str, kind: str | None = None, *more: str) -> Job:
        arm = ARMS[name]
        words = ["train", "--model", str(models[arm.tied]), "--data", str(sums if arm.plays else stream)]
        words += ["--plugin", arm.plugin] if arm.plugin else []
        options = [f"plugins.{arm.plugin}.{option}" for option in arm.options]
        if name == "iterative-dpo":
            options.append(f"plugins.{name}.reward={judge}")
        settings = [*(PLAY if arm.plays else STREAM), *arm.settings, *options]
        words += [word for setting in settings for word in ("--set", setting)]
        sharded = SHARDED[kind] if kind else []
        return Job(name, [*words, *more], 4, sharded, arm.tolerance or {})

    return job


def events(root: Path, kind: str) -> list[dict[str, Any]]:
    lines = (root / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


# ---------------------------------------------------------------------- data-parallel


def launched(names: Sequence[str], make: Callable[..., Job], folder: Path) -> Path:
    """Run the arms in one process and in two, all in one launch each."""
    jobs = [make(name) for name in names]
    run(jobs, folder / "one", 1)
    run(jobs, folder / "two", 2)
    return folder


@pytest.fixture(scope="module")
def both(make: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched([name for name in ARMS if name not in SELDOM], make, tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="module")
def seldom(make: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched(SELDOM, make, tmp_path_factory.mktemp("seldom"))


@pytest.mark.parametrize("name", [name for name in ARMS if name not in SELDOM])
def test_two_processes_equal_one_with_twice_the_batch(
    name: str, make: Callable[..., Job], both: Path
) -> None:
    compared(make(name), both / "one" / name, both / "two" / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SELDOM)
def test_two_processes_equal_one_seldom_tried(name: str, make: Callable[..., Job], seldom: Path) -> None:
    compared(make(name), seldom / "one" / name, seldom / "two" / name)


def test_every_training_plugin_is_compared() -> None:
    installed = {name: hooks_of(load_class(name)) for name in discover()}
    training = {name for name, hooks in installed.items() if set(hooks) & set(TRAINING)}
    assert training == {arm.plugin for arm in ARMS.values() if arm.plugin}


def test_a_run_in_two_processes_is_written_once_and_whole(
    both: Path, make: Callable[..., Job], trainer: Callable[..., Any]
) -> None:
    one, two = both / "one/sparta", both / "two/sparta"
    assert [(event["task"], event["step"]) for event in events(two, "log")] == [
        (task, step) for task in ("colour", "fruit") for step in (1, 2, 3, 4)
    ]
    assert len(events(two, "task")) == 2
    assert len(events(two, "score")) == len(events(one, "score")) == 6
    # The terms are there, and are not all zero.
    assert any(event["loss/orth"] > 1e-6 for event in events(one, "log"))
    assert any(event["loss/components"] > 1e-6 for event in events(one, "log"))
    assert json.loads((two / "manifest.json").read_text())["world_size"] == 2

    # Going on with another number of processes would be another run.
    (two / "result.json").unlink()
    refused = trainer(*make("sparta").command(two, 2), "--resume")
    assert refused.code == 2
    assert "was written by 2 processes, this run has 1" in refused.err


def test_the_answers_of_self_play_are_the_same_whoever_wrote_them(both: Path) -> None:
    one, two = (both / part / "tpaw/rounds/iteration-1/pairs.parquet" for part in ("one", "two"))
    assert pq.read_table(one).column("rejected_ids") == pq.read_table(two).column("rejected_ids")
    metrics = [
        json.loads((both / part / "tpaw/result.json").read_text())["metrics"] for part in ("one", "two")
    ]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4, abs=1e-5)


# ---------------------------------------------------------------------- sharded

WATCH = '''
import os
from graftwork import hookimpl

class Watch:
    """Write down what weights are in training; stop before the micro-batch that STOP_AT names."""

    sharding = frozenset({"zero2", "zero3", "fsdp2"})

    def __init__(self, options):
        self.batches = 0

    @hookimpl
    def batch_begin(self, run, model, batch):
        if not model.training:
            # Answers are scored by the whole model.
            return
        self.batches += 1
        weights = list(model.parameters())
        run.events.write("weights", dtensor=any(hasattr(w, "full_tensor") for w in weights),
                         zero3=any(hasattr(w, "ds_id") for w in weights))
        if os.environ.get("STOP_AT") == str(self.batches):
            raise RuntimeError("stopped")
'''


def declared(name: str) -> frozenset[str]:
    plugin = ARMS[name].plugin
    # In mode gradient PaRSP edits gradients, which DeepSpeed keeps.
    if name == "parsp-gradient":
        return frozenset()
    return frozenset(KINDS) if plugin is None else getattr(load_class(plugin), "sharding", frozenset())


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed; `make slow` brings it",
)
EACH_KIND = [pytest.param(kind, marks=[needs_deepspeed] if "zero" in kind else []) for kind in KINDS]


@pytest.fixture
def watched(tmp_path: Path, extensions: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a launch with the plugin ``watch``, and with DeepSpeed's own folder for what it compiles."""
    site = tmp_path / "site"
    site.mkdir()
    install_plugin(site, "watch", "watchweights:Watch", WATCH)
    # A build that was killed leaves a lock that others wait for.
    return {"PYTHONPATH": str(site), "TORCH_EXTENSIONS_DIR": str(extensions)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EACH_KIND)
def test_sharded_training_equals_one_process(
    kind: str, make: Callable[..., Job], tmp_path: Path, watched: dict[str, str]
) -> None:
    names = [name for name in ARMS if kind in declared(name)]
    assert {"lora", "full", "replay", "tpaw"} <= set(names)
    jobs = [make(name, kind, "--plugin", "watch") for name in names]
    found = compare(jobs, tmp_path, env=watched)
    for job in jobs:
        seen = events(found[job.name].several, "weights")
        # Divided it really was, and by what was asked for.
        assert all(event["dtensor"] == (kind == "fsdp2") for event in seen)
        assert all(event["zero3"] == (kind == "zero3") for event in seen)
    text = torch.arange(3, 40)[None]
    for name in ("lora", "full", "tied"):
        # What is left is whole: it is loaded as any other.
        first, second = (
            load_chosen(ModelOptions(ref=str(root)))(text).logits
            for root in (found[name].one, found[name].several)
        )
        torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@needs_deepspeed
def test_offloading_changes_nothing(make: Callable[..., Job], tmp_path: Path, extensions: Path) -> None:
    jobs = [
        replace(
            make(name),
            name=f"{name}-{config}",
            sharded=[f"train.deepspeed={RECIPES}/deepspeed/{config}.json"],
        )
        for name in ("lora", "full")
        for config in ("zero2-offload", "zero3-offload")
    ]
    compare(jobs, tmp_path, env={"TORCH_EXTENSIONS_DIR": str(extensions)})


@pytest.mark.slow
@pytest.mark.parametrize("kind", EACH_KIND)
def test_a_sharded_run_goes_on_from_a_checkpoint_inside_a_task(
    kind: str, make: Callable[..., Job], tmp_path: Path, watched: dict[str, str]
) -> None:
    saving = ("--plugin", "watch", "--set", "train.save_strategy=steps", "--set", "train.save_steps=1")
    jobs = [make(name, kind, *saving) for name in ("lora", "full")]
    run(jobs, tmp_path / "one", 1, watched)
    for job in jobs:
        # In the second task's second step.
        with pytest.raises(AssertionError, match="stopped"):
            run([job], tmp_path / "two", 2, {**watched, "STOP_AT": "7"})
        assert not (tmp_path / "two" / job.name / "result.json").exists()
        assert list((tmp_path / "two" / job.name / "stages/current").glob("checkpoint-1/graftwork.json"))
    run([make(job.name, kind, *saving, "--resume") for job in jobs], tmp_path / "two", 2, watched)
    for job in jobs:
        compared(job, tmp_path / "one" / job.name, tmp_path / "two" / job.name)
