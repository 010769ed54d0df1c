"""The whole model with calibration windows, for transforms that learn end to end before any layer is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from graftwork.console import Console


@dataclass(frozen=True)
class Whole:
    """What a transform's ``prepare`` gets.

    Attributes:
        model: alive, in eval mode on its device; it is thrown away afterwards.
        tokenizer: of the model.
        windows: token ids of the calibration texts (windows x window); without rows where no text is set, which a
            transform that needs none allows.
        batch_size: windows that go through together.
        seed: of the run.
        console: bars and lines for the user.
    """

    model: Any
    tokenizer: Any
    windows: torch.Tensor
    batch_size: int
    seed: int
    console: Console
