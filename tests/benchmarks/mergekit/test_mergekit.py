"""Against mergekit: TIES on the same checkpoints, with the same settings, on the same machine.

Each side is a process of its own that reads SmolLM2-135M (float32) and three fine-tunes of it, made here by adding
noise, and writes the merged checkpoint. Its time is that of the processor, for the whole process; its memory is the
largest resident size. mergekit trims every tensor by itself, so ours does (``trim_scope: tensor``); the density is one
at which both count the same number of entries.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork.models import resolve
from graftwork.testing.experts import tensors_of
from graftwork.testing.runs import trainer_command
from measured import in_pairs
from processes import Used, peer_python, run_measured

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
MODEL = "smollm2-135m"
DENSITY = 0.25
EXPERTS = 3
PAIRS = 1
TIME, MEMORY, FLAT = 0.7, 0.7, 1.05


@pytest.fixture(scope="module")
def peer() -> Path:
    return peer_python("mergekit", HERE / "requirements.txt")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """In a process of its own: what this one has held counts as memory of those that it starts."""
    folder = tmp_path_factory.mktemp("experts")
    subprocess.run([sys.executable, HERE / "fine_tunes.py", MODEL, folder, str(EXPERTS)], check=True)
    return [str(folder / f"e{number}") for number in range(EXPERTS)]


def ours(experts: list[str], output: Path, *settings: str) -> Used:
    sets = [
        *(f"transform.experts.e{number}={ref}" for number, ref in enumerate(experts)),
        "transform.merge.embeddings=merge",
        *settings,
    ]
    words = ["transform", "--model", MODEL, "--plugin", "ties", "--output", str(output)]
    used = run_measured(trainer_command([*words, *(word for one in sets for word in ("--set", one))]))
    seconds = json.loads((output / "result.json").read_text())["eval_seconds"]
    return Used(used.seconds, used.peak_mib, {"merge_seconds": seconds})


def theirs(python: Path, experts: list[str], output: Path) -> Used:
    return run_measured([python, HERE / "merge.py", resolve(MODEL).path, str(DENSITY), output, *experts])


def test_memory_is_flat_over_the_number_of_experts(experts: list[str], tmp_path: Path) -> None:
    """One expert, and eight (the three, named more than once)."""
    peaks = {}
    for count in (1, 8):
        ours([experts[number % EXPERTS] for number in range(count)], tmp_path / f"of-{count}")
        peaks[count] = json.loads((tmp_path / f"of-{count}/result.json").read_text())["peak_memory_bytes"]
    print("\npeak MiB:", {count: round(peak / 2**20) for count, peak in peaks.items()})
    assert peaks[8] <= FLAT * peaks[1]


def undecided(deltas: list[torch.Tensor]) -> torch.Tensor:
    """Return where the definition leaves a choice, which the two make differently.

    A difference is exactly as large as its expert's threshold: of several such entries mergekit keeps any, ours the
    first ones. Or those that are kept sum to exactly 0: mergekit then takes the positive ones, ours none.
    """
    found = torch.zeros_like(deltas[0], dtype=torch.bool)
    kept = []
    for delta in deltas:
        size = delta.abs()
        count = size.numel() - int(DENSITY * size.numel()) + 1
        threshold = size.flatten().kthvalue(count).values
        found |= size == threshold
        kept.append(torch.where(size >= threshold, delta, 0.0))
    return found | (sum(one.double() for one in kept) == 0)


def test_time_memory_and_result(record: Any, peer: Path, experts: list[str], tmp_path: Path) -> None:
    runs: dict[str, list[Used]] = {"ours": [], "theirs": []}

    def one(side: str) -> float:
        output = tmp_path / f"{side}-{len(runs[side])}"
        done = (
            ours(experts, output, "plugins.ties.trim_scope=tensor", f"plugins.ties.keep={DENSITY}")
            if side == "ours"
            else theirs(peer, experts, output)
        )
        runs[side].append(done)
        return done.seconds

    in_pairs(lambda: one("ours"), lambda: one("theirs"), pairs=PAIRS, warmup=0, label="TIES, two libraries")
    misses: list[str] = []

    def hold(what: str, mine: list[float], other: list[float], limit: float, unit: str) -> None:
        # All figures are written, whichever of them misses.
        try:
            record(f"mergekit_{what}", ("graftwork ties", mine), ("mergekit", other), limit=limit, unit=unit)
        except AssertionError as error:
            misses.append(str(error))

    mine, other = runs["ours"], runs["theirs"]
    hold("time", [run.seconds for run in mine], [run.seconds for run in other], TIME, "s of processor")
    hold(
        "merge_time",
        [run.said["merge_seconds"] for run in mine],
        [run.said["merge_seconds"] for run in other],
        TIME,
        "s",
    )
    hold("memory", [run.peak_mib for run in mine], [run.peak_mib for run in other], MEMORY, "MiB")
    found, expected = tensors_of(tmp_path / "ours-0/model"), tensors_of(tmp_path / "theirs-0")
    assert set(found) == set(expected) - {"lm_head.weight"}
    base = tensors_of(Path(resolve(MODEL).path))
    tuned = [tensors_of(Path(ref)) for ref in experts]
    unlike = 0
    for name, tensor in found.items():
        different = (tensor - expected[name].float()).abs() > 1e-6
        if bool(different.any()):
            unlike += int(different.sum())
            free = undecided([one[name] - base[name] for one in tuned])
            assert bool(free[different].all()), f"{name}: entries differ for no reason"
    print(f"\n{unlike} entries differ by more than 1e-6, all of them where the definition leaves a choice")
    assert not misses, "\n".join(misses)
