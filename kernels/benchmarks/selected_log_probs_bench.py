"""Log-probabilities of chosen tokens, forward and backward: a head that is frozen, and one that learns.

``python kernels/benchmarks/run.py selected_log_probs`` measures time; this file itself measures on CPU what each
side adds to the memory of a fresh process and writes ``results/selected_log_probs-memory-cpu.csv``.
"""

from __future__ import annotations

import csv
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from graftwork_kernels.selected_log_probs import selected_log_probs
from harness import RESULTS, Case, compiled
from torch.nn import functional as F

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Tokens, width, vocabulary: SmolLM2-135M's head; Llama 3 8B's on a GPU.
SMALL, LARGE, QUICK = (512, 576, 49152), (8192, 4096, 128256), (64, 64, 2048)
Step = Callable[[], object]


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The path that makes the logits; the softmax is in float32, as a loss over answers has it."""
    table = F.log_softmax(F.linear(hidden, weight), -1, dtype=torch.float32)
    return table.gather(1, labels[:, None]).squeeze(1)


def trl(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ("log_probs",))[
        0
    ]


def liger(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    # Its gradients are made for the mean, the only weighting that it knows.
    return -LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels)[0]


def problem(
    size: tuple[int, int, int], dtype: torch.dtype, *, learns: bool, device: torch.device | str = "cpu"
) -> Callable[[Callable[..., torch.Tensor]], Step]:
    """Return what makes a step, forward and backward, of a side."""
    tokens, width, vocabulary = size
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) * width**-0.5).to(dtype).requires_grad_(learns)
    labels = torch.randint(vocabulary, (tokens,), device=device)

    def of(side: Callable[..., torch.Tensor]) -> Step:
        def step() -> None:
            hidden.grad = weight.grad = None
            side(hidden, weight, labels).sum().backward()

        return step

    return of


def rivals(device: torch.device) -> tuple[Mapping[str, Callable[..., torch.Tensor]], Mapping[str, str]]:
    found: dict[str, Callable[..., torch.Tensor]] = {}
    missing: dict[str, str] = {}
    if importlib.util.find_spec("trl"):
        found["trl"] = trl
    else:
        missing["trl"] = "not installed"
    if not importlib.util.find_spec("liger_kernel"):
        missing["liger"] = "not installed"
    elif device.type != "cuda":
        missing["liger"] = "runs on GPUs only"
    else:
        found["liger"] = liger
    return found, missing


def cases(device: torch.device, *, quick: bool) -> Iterable[Case]:
    """Yield the cases."""
    cuda = device.type == "cuda"
    found, missing = rivals(device)
    sides: dict[str, Callable[..., torch.Tensor]] = {"ours": selected_log_probs, "eager": plain}
    if cuda:
        sides["compile"] = compiled(plain)
    sides |= found
    for size in [QUICK] if quick else [SMALL, LARGE] if cuda else [SMALL]:
        tokens, width, vocabulary = size
        for dtype in DTYPES.values():
            if cuda and size == LARGE and dtype == torch.float32:
                continue
            for learns in (False, True):
                of = problem(size, dtype, learns=learns, device=device)
                operands = (tokens + vocabulary) * width
                gradients = tokens * width + learns * vocabulary * width
                yield Case(
                    "selected_log_probs",
                    f"T{tokens} D{width} V{vocabulary}, head {'learns' if learns else 'frozen'}",
                    dtype,
                    {name: of(side) for name, side in sides.items()},
                    bytes_moved=(operands + gradients) * dtype.itemsize,
                    flops=(3 if learns else 2) * 2 * tokens * width * vocabulary,
                    missing=missing,
                )


def added_bytes(side: str, dtype: str, learns: bool) -> tuple[int, int]:
    """Return by how much a step raises the peak of this process, and the bytes of the gradients that it leaves."""
    call = {"ours": selected_log_probs, "eager": plain, "trl": trl}[side]
    problem(QUICK, DTYPES[dtype], learns=learns)(call)()
    step = problem(SMALL, DTYPES[dtype], learns=learns)(call)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    tokens, width, vocabulary = SMALL
    left = (tokens + learns * vocabulary) * width * DTYPES[dtype].itemsize
    return _status("VmHWM") - before, left


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def memory() -> None:
    """Measure every side in a process of its own."""
    rows = []
    for dtype in DTYPES:
        for learns in (False, True):
            measured = {}
            for side in ("ours", "eager", *(["trl"] if importlib.util.find_spec("trl") else [])):
                command = [sys.executable, __file__, side, dtype, str(int(learns))]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                measured[side] = tuple(map(int, done.stdout.split()))
            for side, (added, left) in measured.items():
                plain_added = measured["eager"][0]
                rows.append(
                    {
                        "case": "T{} D{} V{}".format(*SMALL) + f", head {'learns' if learns else 'frozen'}",
                        "dtype": dtype,
                        "side": side,
                        "added_mib": f"{added / 2**20:.1f}",
                        "of_which_gradients_mib": f"{left / 2**20:.1f}",
                        "share_of_eager": f"{added / plain_added:.3f}",
                        "share_without_gradients": f"{(added - left) / (plain_added - left):.3f}",
                    }
                )
                print(*rows[-1].values(), sep="  ", flush=True)
    path = RESULTS / "selected_log_probs-memory-cpu.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {path}")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(*added_bytes(sys.argv[1], sys.argv[2], sys.argv[3] == "1"))
    else:
        memory()
