"""Tasks whose inputs are known to be orthogonal or to overlap: what is kept, and what can still be learned."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from graftwork_parsp import ParspConfig, begin_region, fold, top_directions
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

D, M = 24, 40


class Toy(nn.Module):
    """One MLP of the Llama kind, whose inputs are the data."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, M, bias=False), nn.Linear(D, M, bias=False)
        self.down_proj = nn.Linear(M, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass
class ToyTask:
    x: torch.Tensor
    y: torch.Tensor


def tasks() -> dict[str, ToyTask]:
    """A in directions 0 to 7, B in 8 to 15 (orthogonal to A), C in 4 to 19 (overlaps with both)."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    found = {}
    for name, (low, high) in {"A": (0, 8), "B": (8, 16), "C": (4, 20)}.items():
        x = torch.randn(200, high - low, generator=generator) @ turn[low:high]
        found[name] = ToyTask(x, torch.tanh(x @ torch.randn(D, D, generator=generator) / 4))
    return found


def loss_of(model: nn.Module, task: ToyTask) -> torch.Tensor:
    return (model(task.x) - task.y).square().mean()


def learn(model: PeftModel, task: ToyTask, moment: torch.Tensor | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    core = torch.randperm(M, generator=generator)[:20]
    bases = None if moment is None else {"": top_directions(moment, 1e-7)}
    begin_region(model, {"": core}, bases)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )
    for _ in range(150):
        optimizer.zero_grad()
        loss_of(model, task).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    fold(model)


@pytest.fixture
def model() -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(Toy(), ParspConfig(density=0.5))


def test_orthogonal_and_overlapping_tasks(model: PeftModel) -> None:
    stream = tasks()
    moment = torch.zeros(D, D).double()
    outputs, dropped = {}, {}
    for number, (name, task) in enumerate(stream.items()):
        before = loss_of(model, task).item()
        learn(model, task, moment if number else None, seed=number)
        dropped[name] = 1 - loss_of(model, task).item() / before
        # Nothing that was learned earlier has moved.
        for earlier, output in outputs.items():
            torch.testing.assert_close(model(stream[earlier].x), output, rtol=0, atol=1e-5)
        outputs[name] = model(task.x).detach()
        moment += task.x.double().T @ task.x.double() / len(task.x)
    # B has all of its directions free and learns as A did; C has 4 of 16 and learns less.
    assert dropped["A"] > 0.3
    assert dropped["B"] > 0.3
    assert 0.0 < dropped["C"] < 0.6 * dropped["B"]


def test_without_the_null_space_an_overlapping_task_is_forgotten(model: PeftModel) -> None:
    stream = tasks()
    learn(model, stream["A"], None, seed=0)
    output, kept = model(stream["A"].x).detach(), loss_of(model, stream["A"]).item()
    learn(model, stream["C"], None, seed=2)
    assert (model(stream["A"].x) - output).abs().max() > 1e-2
    assert loss_of(model, stream["A"]).item() > 1.1 * kept


def test_the_same_region_again_keeps_both(model: PeftModel) -> None:
    """Cores may overlap: it is the directions that keep tasks apart."""
    stream = tasks()
    learn(model, stream["A"], None, seed=0)
    output = model(stream["A"].x).detach()
    learn(model, stream["B"], stream["A"].x.double().T @ stream["A"].x.double(), seed=0)
    torch.testing.assert_close(model(stream["A"].x), output, rtol=0, atol=1e-5)
    layer = model.base_model.model.gate_proj
    assert len(layer.parsp_rows["default"]) == 20
