"""What ``transform.deepspeed`` may say, what is filled in, and how texts are shared by processes."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.hookspecs import WeightTransform
from graftwork.testing.models import tiny_checkpoint, tiny_model
from graftwork.transform import activations
from graftwork.transform.activations import Stream
from graftwork.transform.deepspeed import DeepSpeedSource, check_partitioned, inference_config
from graftwork.transform.limits import Need, need, sizes
from graftwork.transform.options import TransformOptions
from graftwork.transform.source import CheckpointSource

installed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed; `make slow` brings it"
)


def config(*, dtype: torch.dtype = torch.float32, processes: int = 1, **fields: Any) -> dict[str, Any]:
    zero = {"stage": 3, **fields.pop("zero", {})}
    return inference_config({"zero_optimization": zero, **fields}, dtype, 1000, processes)


def test_what_is_left_open_is_filled_in() -> None:
    found = config(
        train_batch_size="auto",
        gradient_accumulation_steps=4,
        gradient_clipping="auto",
        bf16={"enabled": "auto"},
        zero={"stage3_prefetch_bucket_size": "auto", "offload_param": {"device": "cpu"}},
        dtype=torch.bfloat16,
    )
    assert found == {
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu"},
            "memory_efficient_linear": False,
        },
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
    }


def test_it_may_stand_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert inference_config(str(path), torch.float32, 10, 1) == config()
    with pytest.raises(UserError, match=r"transform.deepspeed names '.*none.json', which cannot be read"):
        inference_config(str(tmp_path / "none.json"), torch.float32, 10, 1)


@pytest.mark.parametrize("name", ["cpu", "nvme"])
def test_configs_of_the_recipes_are_fit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[3] / "recipes/deepspeed"
    fields = json.loads((folder / f"zero3-transform-{name}.json").read_text())
    offload = fields["zero_optimization"]["offload_param"]
    assert offload["device"] == name
    if name == "nvme":
        # Where the drive is, everybody must say.
        with pytest.raises(UserError, match="which is no folder"):
            inference_config(fields, torch.bfloat16, 1000, 1)
        offload["nvme_path"] = str(tmp_path)
    found = inference_config(fields, torch.bfloat16, 1000, 1)
    assert found["bf16"]["enabled"]
    assert found["zero_optimization"]["offload_param"].get("buffer_size", 1000) >= 1000


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "stage 0, which leaves the whole model in every process; set zero_optimization.stage to 3"),
        ({"zero_optimization": {"stage": 2}}, "stage 2, which"),
        ({"zero_optimization": {"stage": 3}, "optimizer": {"type": "Adam"}}, "'optimizer', which is for"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        (
            {"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}},
            "turns fp16 on, and the model is bfloat16",
        ),
        (
            {"zero_optimization": {"stage": 3}, "bf16": {"enabled": False}},
            "turns bf16 off, and the model is bfloat16",
        ),
    ],
)
def test_what_cannot_work_is_refused(value: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        inference_config(value, torch.bfloat16, 1000, 1)
    assert "\n" not in str(caught.value)


def test_float64_is_refused() -> None:
    with pytest.raises(UserError, match=r"the model is float64; set model.dtype"):
        config(dtype=torch.float64)


def test_nvme_needs_a_folder_and_buffers_for_the_largest_parameter(tmp_path: Path) -> None:
    def offload(processes: int = 1, **fields: Any) -> dict[str, Any]:
        section = {"device": "nvme", **fields}
        return config(zero={"offload_param": section}, processes=processes)

    with pytest.raises(UserError, match=r"names no folder; set zero_optimization.offload_param.nvme_path"):
        offload()
    with pytest.raises(UserError, match=r"names '.*gone', which is no folder"):
        offload(nvme_path=str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"buffers of 999 values.*buffer_size to 1000 or more"):
        offload(nvme_path=str(tmp_path), buffer_size=999)
    with pytest.raises(UserError, match=r"its part in one of 3 processes.*buffer_size to 334 or more"):
        offload(nvme_path=str(tmp_path), buffer_size=333, processes=3)
    found = offload(nvme_path=str(tmp_path), buffer_size="auto", processes=3)
    assert found["zero_optimization"]["offload_param"]["buffer_size"] == 334


def test_without_deepspeed_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'graftwork\[deepspeed\]'"):
        DeepSpeedSource("anything", {"zero_optimization": {"stage": 3}})


def test_what_learns_from_the_whole_model_is_refused() -> None:
    def block(layer: Any) -> None: ...

    check_partitioned([("a", WeightTransform("a", block))])
    learning = WeightTransform("b", block, needs="end_to_end", prepare=lambda whole: {})
    with pytest.raises(UserError, match="plugin 'b' learns from the whole model"):
        check_partitioned([("a", WeightTransform("a", block)), ("b", learning)])


@installed
def test_a_field_that_deepspeed_does_not_know_is_told(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    zero = {"stage": 3, "offload_params": {"device": "cpu"}}
    with pytest.raises(UserError, match="DeepSpeed refuses zero_optimization: offload_params") as caught:
        DeepSpeedSource(str(folder), {"zero_optimization": zero})
    assert "\n" not in str(caught.value)


@installed
def test_the_model_is_read_when_it_is_needed(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    source, files = DeepSpeedSource(str(folder), {"zero_optimization": zero}), CheckpointSource(str(folder))
    assert not torch.distributed.is_initialized()
    assert (source.folder, source.dtype) == (files.folder, files.dtype)
    names = [name for name, _ in source.skeleton().named_parameters()]
    assert source.held == sum(one.numel() * one.element_size() for one in files.tensors(names).values())


def test_the_estimate_counts_shares_and_what_the_source_holds() -> None:
    options = TransformOptions.model_validate({"calibration": "random", "window": 512})
    size = sizes(tiny_model("llama"), torch.float32)

    def wanted(**more: int) -> Need:
        texts = {"calibration": 2**20, "evaluation": 0, "dense": False, "statistics": 1, "whole": False}
        return need(size, options, **texts, batch_size=1, in_memory=True, **more)

    one, two, holding = wanted(), wanted(processes=2), wanted(held=12345)
    assert two.parts["hidden states"] == one.parts["hidden states"] // 2
    assert holding.memory == one.memory + 12345


# ---------------------------------------------------------------------- who has which windows


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stream]:
    def call(rank: int, world: int, windows: torch.Tensor, batch_size: int) -> Stream:
        monkeypatch.setattr(activations, "rank_and_world", lambda: (rank, world))
        return Stream("calibration", windows, batch_size)

    return call


@pytest.mark.parametrize(
    ("count", "world", "batch_size"), [(7, 2, 2), (8, 3, 4), (5, 5, 8), (1, 1, 4), (2, 3, 1)]
)
def test_every_window_is_with_one_process(
    count: int, world: int, batch_size: int, as_process: Callable[..., Stream]
) -> None:
    windows = torch.randint(3, 250, (count, 8), generator=torch.Generator().manual_seed(0))
    streams = [as_process(rank, world, windows, batch_size) for rank in range(world)]
    owners = sorted(number for stream in streams for number in stream.own)
    assert owners == list(range(len(streams[0])))
    for stream in streams:
        assert torch.equal(torch.cat(stream.ids), windows)
        assert max(map(len, stream.ids)) <= batch_size
        assert stream.tokens == windows.numel()
    # Nobody is without work where there is some for all.
    assert all(len(stream.own) > 0 for stream in streams) or count < world


def test_a_share_is_embedded_and_all_arguments_are_known(as_process: Callable[..., Stream]) -> None:
    model = tiny_model("llama")
    windows = torch.randint(3, 250, (5, 8), generator=torch.Generator().manual_seed(0))
    whole = as_process(0, 1, windows, 2)
    whole.start(model)
    mine = as_process(1, 2, windows, 2)
    mine.start(model)
    assert list(mine.own) == [1]
    ((hidden, _),) = mine.share()
    assert torch.equal(hidden, whole.get(1)[0])
    # Batches of other processes, the short last one included, are run with their arguments, too.
    assert mine.arguments(2).keys() == whole.arguments(2).keys()
