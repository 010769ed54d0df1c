"""What processes exchange: in two of them, in a group of one, and where there is no group."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from graftwork.distributed import (
    active,
    from_main,
    from_rank,
    mean_over_ranks,
    meet,
    over_ranks,
    started,
    together,
)

# Every process sends what only it knows and prints what it got.
CODE = """
import json, torch
from graftwork import distributed as d

rank, world = d.started()
assert not d.active()
d.meet()
mine = torch.tensor([1.5, -2.0], dtype=torch.bfloat16) if rank == 1 else None
sent = d.from_rank(mine, 1)
number = torch.tensor([rank + 1.0, -rank], dtype=torch.float64)
joined = [d.over_ranks(number, join).tolist() for join in (torch.add, torch.maximum, torch.minimum)]
# Rows 1 | 2, 3, 6: their mean is 3, where the mean of both means would be 7 / 3.
rows = torch.tensor([1.0] if rank == 0 else [2.0, 3.0, 6.0], requires_grad=True)
part = d.mean_over_ranks(rows.sum(), len(rows))
part.backward()
mean = [d.over_ranks(part.detach(), torch.add).item() / world, rows.grad[0].item() / world]
nothing = d.mean_over_ranks(rows[:0].sum(), 0).item()
empty = d.from_rank(torch.zeros(0, 3) if rank == 0 else None, 0)
print(json.dumps([d.rank_and_world(), str(sent.dtype), sent.tolist(), joined, number.tolist(), list(empty.shape),
                  d.from_main(rank), d.gather_objects(rank), mean, nothing]))
d.leave()
"""


def test_two_processes() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CODE],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(processes):
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        joined = [[3.0, -1.0], [2.0, 0.0], [1.0, -1.0]]
        own = [rank + 1.0, -rank]
        assert json.loads(out) == [
            [rank, 2],
            "torch.bfloat16",
            [1.5, -2.0],
            joined,
            own,
            [0, 3],
            0,
            [0, 1],
            [3.0, 0.25],
            0.0,
        ]


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    x = torch.randn(3)
    assert started() == (0, 1)
    assert from_rank(x, 0) is x
    assert over_ranks(x, torch.maximum) is x
    assert from_main("a") == "a"
    torch.testing.assert_close(mean_over_ranks(x.sum(), torch.tensor(3)), x.mean())
    assert mean_over_ranks(x[:0].sum(), 0) == 0
    for _ in range(2):
        # Twice: what comes after must find everything as before.
        with together():
            assert active()
            meet()
            assert torch.equal(from_rank(x, 0), x)
            assert torch.equal(over_ranks(x, torch.add), x)
        assert not active()
    assert "LOCAL_RANK" not in os.environ
