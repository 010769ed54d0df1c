"""What training on pairs of answers costs against TRL's DPO trainer: time of a step, peak memory, the head alone.

Both sides train the same pairs with DPO's loss, the same optimizer and the same adapter; their losses are
compared at the end. TRL computes the reference's log-probabilities in every step where nobody asks it not to.
With ``precompute_ref_log_probs`` it computes them before, as we do, and is the harder peer.

Memory is the resident memory of a process of its own, as a whole and as what it grew by after the model was
loaded. How much of it the C library keeps after it was freed is another question than how much was needed at
once: glibc's heap keeps much of what a training step frees. So both are measured, glibc as it is, and told to
give back at once every block of more than a mebibyte.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from measured import in_pairs
from preferences import LORA, REAL, SIDES, SLICE, build, head_problem, losses
from turns import train_in_turns

pytestmark = pytest.mark.slow
HEAD_TOKENS, VOCABULARY = 1024, REAL["vocab_size"]
LIMIT_TIME, LIMIT_MEMORY = 1.0, 0.6
# Name: model, pairs a step, tokens of a sequence, steps, and steps before the first that counts.
SIZES = {
    "6 layers, vocabulary 259": (SLICE, 2, 128, 25, 5),
    "30 layers, vocabulary 49,152": (REAL, 1, 128, 10, 2),
}
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
ALLOCATORS = {"glibc as it is": {}, "freed at once": GIVE_BACK}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_the_head_alone(head: str, dtype: str, record: Any) -> None:
    """Forward and backward. On the CPU TRL's head is its PyTorch code; its kernel is for GPUs."""
    steps = head_problem(HEAD_TOKENS, trained=head == "trained", dtype=getattr(torch, dtype))
    ours, theirs = steps["ours"](), steps["dpo"]()
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.05 if dtype == "bfloat16" else 1e-4)
    name = f"head {head}, {dtype}, {HEAD_TOKENS} tokens, vocabulary {VOCABULARY:,}"
    seconds = in_pairs(
        lambda: cpu_seconds(steps["ours"]), lambda: cpu_seconds(steps["dpo"]), pairs=7, label=name
    )
    record("pair_head_time", (name, seconds[0]), ("TRL's", seconds[1]), limit=LIMIT_TIME, unit="CPU s")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_memory_of_the_head_alone(head: str, dtype: str, record: Any) -> None:
    sides = in_pairs(
        lambda: measured("head", "ours", head, dtype)["growth"],
        lambda: measured("head", "dpo", head, dtype)["growth"],
        pairs=2,
        warmup=0,
        label=f"memory of the head, {head}, {dtype}",
    )
    name = f"head {head}, {dtype}, {HEAD_TOKENS} tokens, vocabulary {VOCABULARY:,}"
    record("pair_head_memory", (name, sides[0]), ("TRL's", sides[1]), limit=LIMIT_MEMORY, unit="MiB")


@pytest.mark.parametrize("peer", ["dpo", "precomputed"])
@pytest.mark.parametrize("size", SIZES)
def test_step_time(size: str, peer: str, record: Any, tmp_path: Path) -> None:
    """LoRA on all linear layers, gradient checkpointing as is DPOConfig's default, half of a sequence is prompt."""
    shape, pairs, length, steps, warmup = SIZES[size]
    trainers = [
        build(side, tmp_path / side, steps=steps, pairs=pairs, length=length, shape=shape)
        for side in ("ours", peer)
    ]
    seconds, unit = train_in_turns(trainers, warmup=warmup, label=f"{size}, {peer}")
    ours, theirs = (torch.tensor(losses(trainer)) for trainer in trainers)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    record(
        "pair_step_time",
        (f"{SIDES['ours']}, LoRA rank {LORA.r}, {size}, {pairs} pairs of {length} tokens", seconds[0]),
        (SIDES[peer], seconds[1]),
        limit=LIMIT_TIME,
        unit=unit,
    )


@pytest.mark.parametrize("peer", ["dpo", "precomputed"])
@pytest.mark.parametrize("case", ["lora", "full"])
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_peak_memory(allocator: str, case: str, peer: str, record: Any) -> None:
    """One pair of 1,024 tokens each a step on SmolLM2-135M's geometry in float32, with gradient checkpointing.

    With full weights the default DPO trainer has a second model in memory, as a reference.
    """
    ours, theirs = (measured("step", side, case, **ALLOCATORS[allocator]) for side in ("ours", peer))
    name = f"{SIDES['ours']}, {case}, {allocator}"
    # Both rows are written, whichever of them misses its limit.
    try:
        row(record, f"{name}: whole process", ours["peak"], SIDES[peer], theirs["peak"])
    finally:
        row(record, f"{name}: growth over the model", ours["growth"], SIDES[peer], theirs["growth"])


def row(record: Any, name: str, ours: float, peer: str, theirs: float) -> None:
    record("pair_memory", (name, [ours]), (peer, [theirs]), limit=LIMIT_MEMORY, unit="MiB")


_MEASURED: dict[Any, dict[str, float]] = {}


def measured(*words: str, **environment: str) -> dict[str, float]:
    """Return what the script prints; a training run, which takes minutes, is measured once for all tests."""
    key = (words, *environment.items())
    if words[0] == "step" and key in _MEASURED:
        return _MEASURED[key]
    script = Path(__file__).with_name("preferences.py")
    done = subprocess.run(
        [sys.executable, str(script), *words],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    _MEASURED[key] = json.loads(done.stdout.splitlines()[-1])
    return _MEASURED[key]


def cpu_seconds(step: Any) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started
