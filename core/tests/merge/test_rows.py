"""Rows straight from files are those of the safetensors library, for every dtype and number of axes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from graftwork import UserError
from graftwork.merge.rows import as_matrix, digest, read_rows, stored_tensors
from safetensors.torch import save_file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_all_shapes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "vector": torch.randn(7).to(dtype),
        "matrix": torch.randn(5, 3).to(dtype),
        "stack": torch.randn(4, 2, 3).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = stored_tensors([tmp_path / "model.safetensors"])
    for name, tensor in tensors.items():
        rows, columns = found[name].matrix
        assert torch.equal(read_rows(found[name], slice(0, rows)), tensor.view(rows, columns))
    assert torch.equal(read_rows(found["matrix"], slice(2, 4)), tensors["matrix"][2:4])
    assert as_matrix((7,)) == (1, 7)
    assert as_matrix((4, 2, 3)) == (4, 6)


def test_a_file_that_shrank_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(100, 10)}, path)
    tensor = stored_tensors([path])["x"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="it ends early"):
        read_rows(tensor, slice(0, 100))


def test_the_digest_is_that_of_the_file_or_of_the_list(tmp_path: Path) -> None:
    one, two = tmp_path / "a", tmp_path / "b"
    one.write_bytes(b"1"), two.write_bytes(b"2")
    sums = [hashlib.sha256(text).hexdigest() for text in (b"1", b"2")]
    assert digest([one]) == sums[0]
    listed = f"{sums[0]}  a\n{sums[1]}  b\n"
    assert digest([two, one]) == hashlib.sha256(listed.encode()).hexdigest()
