"""Which path is taken, and that it is said once."""

from __future__ import annotations

import pytest
import torch
from graftwork_kernels import announce, dispatch, path_of


def test_cpu_tensors_take_pytorch_unless_interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.ones(2)
    assert not dispatch.fused(here)
    if not dispatch.INTERPRETED:
        pytest.skip("there is a GPU here, and nothing is interpreted")
    with dispatch.interpreting():
        assert dispatch.fused(here)
        assert "interpreted" in path_of("cpu")
    assert not dispatch.fused(here)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), dispatch.interpreting():
        pass


def test_without_triton_all_is_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    assert not dispatch.fused(torch.ones(2))
    assert path_of("cpu") == "PyTorch (Triton is not installed)"


def test_the_path_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_SAID", set())
    said: list[str] = []
    announce(said.append, "cpu")
    announce(said.append, "cpu")
    assert said == [f"kernels: {path_of('cpu')}"]
    assert "PyTorch" in said[0]
