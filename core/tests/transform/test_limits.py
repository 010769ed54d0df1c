"""The estimate grows with what costs, and a bound is kept to or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.testing.models import tiny_model
from graftwork.transform.limits import GIB, Need, Sizes, check_disk, fitted, need, sizes
from graftwork.transform.options import TransformOptions

SEVEN = Sizes(32, 202_383_360, 4096 * 11008, 11008, 11008, 4096, 32000, 262_000_000, 2, 6_700_000_000)
OPTIONS = TransformOptions.model_validate({"calibration": "random"})


def wanted(options: TransformOptions = OPTIONS, size: Sizes = SEVEN, **changes: Any) -> Need:
    settings: dict[str, Any] = {
        "calibration": 128 * 2048,
        "evaluation": 0,
        "dense": False,
        "statistics": 1,
        "whole": False,
        "batch_size": 4,
        "in_memory": True,
    }
    return need(size, options, **{**settings, **changes})


def test_it_is_bounded_by_a_layer_and_not_by_the_model() -> None:
    assert wanted().memory == wanted(size=replace(SEVEN, layers=320, whole=67_000_000_000)).memory
    assert wanted(in_memory=False).memory < 8 * GIB < SEVEN.whole * 2


def test_what_costs_more_needs_more() -> None:
    plain = wanted()
    assert wanted(dense=True).memory > plain.memory
    assert wanted(evaluation=100_000).memory > plain.memory
    assert wanted(whole=True).memory > SEVEN.whole * 2
    assert wanted(in_memory=False).memory < plain.memory
    assert wanted(statistics=3).operations > plain.operations


def test_sizes_are_those_of_the_model() -> None:
    model = tiny_model("llama")
    found = sizes(model, torch.bfloat16)
    assert (found.layers, found.item, found.hidden) == (2, 2, 32)
    assert found.widest == 48
    assert found.layer * 2 + found.embedding == found.whole == sum(p.numel() for p in model.parameters())


def test_a_bound_is_kept_to_by_disk_then_by_batches_then_refused() -> None:
    def again(batch_size: int, in_memory: bool) -> Need:
        return wanted(options, batch_size=batch_size, in_memory=in_memory)

    def bounded(size: str) -> TransformOptions:
        return TransformOptions.model_validate({"calibration": "random", "memory": size})

    options = OPTIONS
    assert fitted(again(4, True), options, again).in_memory
    options = bounded("8GiB")
    found = fitted(again(4, True), options, again)
    assert (found.in_memory, found.batch_size) == (False, 4)
    options = bounded(f"{again(2, False).memory / 2**20 + 1:.0f}MiB")
    assert fitted(again(4, True), options, again).batch_size == 2
    options = bounded("2GiB")
    with pytest.raises(UserError, match=r"transform\.memory=2GiB is too little: with batches of 1"):
        fitted(again(4, True), options, again)


def test_a_disk_that_is_too_small_is_refused(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="free and the run may need"):
        check_disk(replace(wanted(), disk=1 << 60), tmp_path / "not" / "there")
    check_disk(replace(wanted(), disk=1), tmp_path / "not" / "there")


@pytest.mark.parametrize(
    ("text", "count"), [("8GiB", 8 * GIB), ("1.5 GB", 1_500_000_000), ("800MiB", 800 << 20)]
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert TransformOptions.model_validate({"memory": text}).memory_bytes == count
