from __future__ import annotations

from typing import Any

import pytest
import torch
from graftwork.transform.hadamard import random_signs
from graftwork.transform.modules import CompressedLinear, Factored, Rotation
from graftwork.transform.quantizer import quantize_weight
from graftwork.transform.scheme import ActivationScheme, WeightScheme
from graftwork_dam.packed import PackedLinear, run_packed
from graftwork_kernels import dispatch


def layer(rows: int, columns: int, bits: int = 4, **parts: Any) -> CompressedLinear:
    torch.manual_seed(rows)
    scheme = WeightScheme(bits=bits, group=16, symmetric=bits == 4)
    return CompressedLinear(
        quantize_weight(torch.randn(rows, columns), scheme), torch.randn(rows), **parts
    ).requires_grad_(False)


def correction(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3), torch.randn(3, columns)


PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "corrected": {"correction": correction(20, 48)},
    "rotated": {
        "correction": correction(20, 48),
        "rotation": Rotation(16, random_signs(48, 1)),
        "activations": ActivationScheme(bits=8),
    },
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("parts", PARTS)
def test_outputs_and_gradients_stay(parts: str, bits: int, fused: bool) -> None:
    if fused and not dispatch.INTERPRETED:
        pytest.skip("the kernels' interpreter is not asked for")
    model = layer(20, 48, bits, **PARTS[parts])
    x = torch.randn(2, 5, 48, requires_grad=True)
    wanted = model(x)
    (gradient,) = torch.autograd.grad(wanted.sum(), x)
    stored = model.state_dict()
    assert run_packed(model) == 1
    if fused:
        with dispatch.interpreting():
            found = model(x)
            (same,) = torch.autograd.grad(found.sum(), x)
    else:
        found = model(x)
        (same,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(same, gradient, rtol=1e-5, atol=1e-4)
    assert model.state_dict().keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    # What it saves: the weight is nowhere held as numbers.
    assert model._dense is None


def test_every_factor_runs_packed_and_others_stay() -> None:
    model = torch.nn.Sequential(
        Factored(layer(16, 48), layer(32, 16)), torch.nn.Linear(32, 32), layer(8, 32, bits=8)
    )
    x = torch.randn(3, 48)
    wanted = model(x)
    assert run_packed(model) == 2
    assert [isinstance(one, PackedLinear) for one in (*model[0], model[1], model[2])] == [
        True,
        True,
        False,
        False,
    ]
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-4)
    assert run_packed(model) == 2
