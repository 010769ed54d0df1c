"""Which windows calibrate, and that they are not those that score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from graftwork import UserError
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork.transform.calibration import overlap, read_windows
from graftwork.transform.options import TransformOptions

WORDS = "A text that is long enough for some windows, and says nothing twice but this: nothing. "


@pytest.fixture
def read(tmp_path: Path) -> Any:
    (tmp_path / "a.txt").write_text("".join(f"{n}:{WORDS[n % 40 :]}" for n in range(40)))
    (tmp_path / "b.txt").write_text("Something else altogether, of which not one run is shared. " * 20)

    def windows(seed: int = 0, **options: Any) -> Any:
        placed = {
            key: [str(tmp_path / one) for one in value] if isinstance(value, list) else value
            for key, value in options.items()
        }
        if "calibration" in placed and placed["calibration"] != "random":
            placed["calibration"] = str(tmp_path / placed["calibration"])
        return read_windows(
            TransformOptions.model_validate(placed), tiny_tokenizer(), tiny_model("llama").config, seed
        )

    return windows


def test_windows_are_drawn_with_the_seed(read: Any) -> None:
    one, same, other = (read(s, calibration="a.txt", window=16, samples=5).calibration for s in (0, 0, 1))
    assert one.shape == (5, 16)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert len({tuple(row.tolist()) for row in one}) == 5


def test_too_few_windows_are_told(read: Any) -> None:
    found = read(calibration="a.txt", window=512, samples=99)
    assert len(found.calibration) < 99
    assert "fewer than the 99 asked for; all are used" in found.notes[0]


def test_random_tokens_are_in_the_vocabulary(read: Any) -> None:
    found = read(
        calibration="random", window=64, samples=7, evaluation=["b.txt"], evaluation_window=64
    ).calibration
    assert found.shape == (7, 64)
    assert found.max() < tiny_model("llama").config.vocab_size


def test_the_same_text_twice_is_refused_unless_allowed(read: Any) -> None:
    options: dict[str, Any] = {
        "calibration": "a.txt",
        "window": 32,
        "evaluation": ["a.txt"],
        "evaluation_window": 32,
    }
    with pytest.raises(UserError, match="would flatter the result"):
        read(**options)
    assert any("shares" in note for note in read(**options, overlap="allow").notes)
    assert read(**{**options, "evaluation": ["b.txt"]}).notes == read(calibration="a.txt", window=32).notes


def test_overlap_is_the_share_of_shared_runs() -> None:
    a, b = torch.arange(26)[None], torch.arange(100, 126)[None]
    assert overlap(a, a) == 1
    assert overlap(a, b) == 0
    half = torch.cat([a[:, :13], b[:, :13]], dim=1)
    assert overlap(half, a) == pytest.approx(1 / 14)
