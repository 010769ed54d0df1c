"""Whether two processes learn what one process learns from batches of twice the size.

For tests of plugins and for the conformance kit::

    found = two_processes(["train", "--model", model, "--data", data, "--plugin", "mine"], tmp_path)
    print(found.largest)

Both runs are whole ``trainer train`` jobs. The two processes are real ones, on the CPU (gloo). Starting them takes
longer than a tiny job, so :func:`compare` does many jobs in one launch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TOLERANCE: Mapping[str, float] = {"loss": 1e-5, "grad_norm": 1e-4}
"""Relative tolerance of what every trainer logs. A norm is summed over parameters in another order."""
OF_TERMS = 1e-4, 1e-8
"""Relative and absolute tolerance of the terms of a loss (``loss/...``), of which some are differences."""
OF_OTHERS = 1e-4, 1e-5
"""The same of what a method logs beside it (``reward/margin``): mostly differences of sums of log-probabilities,
which fp32 rounds to about 1e-6 each."""
OF_WEIGHTS = 1e-3, 1e-5
"""The same of trained weights: Adam's first steps magnify the rounding of small gradients."""
STARTING, EACH = 300, 60
"""Seconds after which a launch is given up: for its start (DeepSpeed compiles at its first), and for each job."""
LATE = 124
SIZE = "train.per_device_train_batch_size"
CALM = ("train.adam_epsilon=1e-5", "train.logging_steps=1")
"""Adam divides by the size of a gradient: with its usual epsilon it blows up the rounding of the smallest ones, and
hides a gradient of the wrong size."""
_WORKER = "graftwork.testing.distributed_worker"


@dataclass(frozen=True)
class Job:
    """A ``trainer train`` job to be run by one process and by several.

    Attributes:
        name: of the folders and in messages.
        words: of the command, without ``--output`` and without the batch size.
        batch: items of a micro-batch over all processes.
        sharded: settings that only the run in several processes gets, such as ``train.fsdp=true``.
        tolerance: relative, by name of a logged figure, where the usual one is too narrow; say why beside it.
    """

    name: str
    words: Sequence[str]
    batch: int = 4
    sharded: Sequence[str] = ()
    tolerance: Mapping[str, float] = field(default_factory=dict)

    def command(self, output: Path, processes: int) -> list[str]:
        """Return the words of the run in ``processes`` processes."""
        if self.batch % processes:
            raise ValueError(f"job '{self.name}': a batch of {self.batch} cannot be dealt to {processes}")
        settings = [*CALM, f"{SIZE}={self.batch // processes}", *(self.sharded if processes > 1 else ())]
        chosen = [word for setting in settings for word in ("--set", setting)]
        return [*self.words, *chosen, "--output", str(output)]


@dataclass(frozen=True)
class Comparison:
    """What came out: both runs' folders, and the largest relative difference of every logged figure.

    ``largest`` maps a figure's name to the largest |a - b| / max(|a|, |b|) over all steps in which the figure is large
    enough for the relative tolerance to be the wider one. ``steps`` is how many steps were compared.
    """

    one: Path
    several: Path
    steps: int
    largest: Mapping[str, float]


def two_processes(
    words: Sequence[str],
    folder: Path,
    *,
    batch: int = 4,
    sharded: Sequence[str] = (),
    tolerance: Mapping[str, float] | None = None,
) -> Comparison:
    """Run one job in one process and in two, and compare them; see :func:`compare`."""
    job = Job("job", words, batch, sharded, tolerance or {})
    return compare([job], folder)["job"]


def compare(
    jobs: Sequence[Job], folder: Path, *, processes: int = 2, env: Mapping[str, str] | None = None
) -> dict[str, Comparison]:
    """Run every job in one process and in ``processes``, all jobs in one launch each; return what came out, by name.

    Raises:
        AssertionError: a run failed, or both differ in steps, logged losses, gradient norms, trained weights or
            scores; the message names the job.
    """
    run(jobs, folder / "one", 1, env)
    run(jobs, folder / "several", processes, env)
    return {job.name: compared(job, folder / "one" / job.name, folder / "several" / job.name) for job in jobs}


def run(jobs: Sequence[Job], folder: Path, processes: int, env: Mapping[str, str] | None = None) -> str:
    """Run all jobs, each to ``folder/<its name>``, in one launch of so many processes; return what they printed.

    Raises:
        AssertionError: one failed, or all of them took too long; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "jobs.json"
    listed.write_text(json.dumps([[job.name, job.command(folder / job.name, processes)] for job in jobs]))
    words = ["-m", _WORKER, str(listed)]
    if processes > 1:
        rendezvous = ("--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0")
        words = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *rendezvous, *words]
    where = "one process" if processes == 1 else f"{processes} processes"
    code, out, said = _launched([sys.executable, *words], STARTING + EACH * len(jobs), env or {})
    if code:
        failed = folder / "failed"
        name = failed.read_text() if failed.exists() else "the launch"
        why = f"was not done after {STARTING + EACH * len(jobs)} s" if code == LATE else "failed"
        raise AssertionError(f"{name} {why} in {where}: {_told(said)}")
    return out


def _launched(words: Sequence[str], seconds: float, env: Mapping[str, str]) -> tuple[int, str, str]:
    """Return the exit code of ``words`` (:data:`LATE` where it took too long) and what it printed and said."""
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A group of its own, to end all of it.
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )
    try:
        out, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        out, said = process.communicate()
        return LATE, out, said
    except BaseException:
        _end(process)
        raise
    return process.returncode, out, said


def _end(process: subprocess.Popen[str]) -> None:
    """End a launch and what it started: torchrun itself ends its processes, whose groups are their own."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _told(text: str) -> str:
    """Return the end of what a launch said, without torchrun's own summary of the processes."""
    return text.partition("torch.distributed.elastic")[0].strip()[-2000:] or text[-2000:]


def compared(job: Job, one: Path, several: Path) -> Comparison:
    """Compare two finished runs of a job.

    Raises:
        AssertionError: they differ; what, where, and by how much.
    """
    before, after = _logs(one), _logs(several)
    order = [(event["task"], event["step"]) for event in before]
    assert order == [(event["task"], event["step"]) for event in after], f"{job.name}: other steps"
    assert order, f"{job.name}: no step was logged"
    largest: dict[str, float] = {}
    wrong: list[str] = []
    for single, double in zip(before, after, strict=True):
        for key in _figures(single):
            assert key in double, f"{job.name}: '{key}' is logged by one process only"
            a, b = float(single[key]), float(double[key])
            relative, absolute = _tolerance(key)
            relative, size = job.tolerance.get(key, relative), max(abs(a), abs(b))
            if relative * size > absolute:
                largest[key] = max(largest.get(key, 0.0), abs(a - b) / size)
            if not abs(a - b) <= relative * size + absolute:
                where = f"{single['task']} step {single['step']}"
                wrong.append(f"{key} at {where}: {a!r} in one process, {b!r} in several")
    assert not wrong, f"{job.name}: {len(wrong)} figures differ, first {'; '.join(wrong[:4])}"
    _same_weights(job, one, several)
    first, second = (json.loads((root / "result.json").read_text()) for root in (one, several))
    assert first["scores"] == second["scores"], f"{job.name}: scores {first['scores']}, {second['scores']}"
    return Comparison(one, several, len(order), largest)


def _logs(root: Path) -> list[dict[str, Any]]:
    lines = (root / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "log"]


def _tolerance(key: str) -> tuple[float, float]:
    if key in TOLERANCE:
        return TOLERANCE[key], 0.0
    return OF_TERMS if key.startswith("loss/") else OF_OTHERS


def _figures(event: Mapping[str, Any]) -> list[str]:
    """Return the names of the logged figures that are to agree; TRL's own (entropy, accuracy) are means of means."""
    return [key for key in event if key in TOLERANCE or "/" in key]


def weights_of(root: Path) -> dict[str, torch.Tensor]:
    """Return what a run leaves to its user: the tensors of its adapters, or of its model."""
    found = {}
    for part in ("adapter", "model"):
        for path in sorted((root / part).rglob("*.safetensors")):
            where = path.parent.relative_to(root).as_posix()
            found |= {f"{where}/{name}": value for name, value in load_file(path).items()}
    return found


def _same_weights(job: Job, one: Path, several: Path) -> None:
    mine, theirs = weights_of(one), weights_of(several)
    assert mine.keys() == theirs.keys(), f"{job.name}: {sorted(mine.keys() ^ theirs.keys())[:4]}"
    assert mine, f"{job.name}: the run left no weights"
    relative, absolute = OF_WEIGHTS
    for name, value in mine.items():
        torch.testing.assert_close(
            theirs[name],
            value,
            rtol=relative,
            atol=absolute,
            msg=lambda text, name=name: f"{job.name}, {name}: {text}",
        )


def shard_on_cpu() -> None:
    """Have accelerate shard with FSDP2 on the CPU, where it trains data-parallel without a word otherwise.

    For tests: ``fully_shard`` itself works on CPUs, accelerate 1.15 only looks for it beside accelerators. Weights
    that are sharded are no faster on a CPU, so this is of no use to anybody else.
    """
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    original = AcceleratorState.__init__

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = initialise
