"""Windows of tokens for calibration and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwork.data.texts import text_windows
from graftwork.errors import UserError
from graftwork.transform.options import RANDOM, TransformOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NGRAM = 13
"""So many tokens in a row in both texts count as overlap."""
SHARED = 0.01
"""More overlap than this is refused: the calibration text would be the evaluation text."""


@dataclass(frozen=True)
class Windows:
    """Token ids for calibration (windows x window), for every evaluation text, and what to tell the user."""

    calibration: torch.Tensor | None
    evaluation: list[torch.Tensor]
    notes: list[str]


def read_windows(
    options: TransformOptions, tokenizer: PreTrainedTokenizerBase, config: Any, seed: int
) -> Windows:
    """Return the windows that ``options`` name.

    Calibration windows are drawn without replacement from the text's windows, with the seed.

    Raises:
        UserError: a text that is missing or shorter than one window; a window longer than the model's; calibration
            and evaluation texts that overlap.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    wanted = [("transform.window", options.window)] if options.calibration else []
    if options.evaluation:
        wanted.append(("transform.evaluation_window", options.evaluation_window))
    for key, window in wanted:
        if longest and window > longest:
            raise UserError(f"{key}: {window} tokens do not fit the model's window of {longest}")
    notes: list[str] = []
    calibration = None
    if options.calibration == RANDOM:
        calibration = _random(config, options.samples, options.window, seed)
    elif options.calibration:
        every = text_windows(Path(options.calibration), tokenizer, options.window)
        if len(every) < options.samples:
            notes.append(
                f"'{options.calibration}' has {len(every)} windows of {options.window} tokens, "
                f"fewer than the {options.samples} asked for; all are used"
            )
        generator = torch.Generator().manual_seed(seed)
        calibration = every[torch.randperm(len(every), generator=generator)[: options.samples]]
    evaluation = []
    for number, text in enumerate(options.evaluation):
        if text == RANDOM:
            count = options.evaluation_windows or 4
            evaluation.append(_random(config, count, options.evaluation_window, seed + 1 + number))
        else:
            limit = options.evaluation_windows
            evaluation.append(text_windows(Path(text), tokenizer, options.evaluation_window, limit))
    if calibration is not None and options.calibration != RANDOM:
        for text, windows in zip(options.evaluation, evaluation, strict=True):
            share = overlap(calibration, windows)
            if share > SHARED and options.overlap == "refuse":
                raise UserError(
                    f"{share:.0%} of the calibration text's runs of {NGRAM} tokens stand in the evaluation text "
                    f"'{text}', too, which would flatter the result; name another text, or set "
                    f"transform.overlap=allow"
                )
            if share > 0:
                notes.append(f"calibration shares {share:.2%} of its runs of {NGRAM} tokens with '{text}'")
    return Windows(calibration, evaluation, notes)


def overlap(calibration: torch.Tensor, evaluation: torch.Tensor) -> float:
    """Return the share of the calibration windows' runs of 13 tokens that the evaluation windows hold, too."""
    if calibration.shape[1] < NGRAM or evaluation.shape[1] < NGRAM:
        return 0.0
    there = {run.tobytes() for window in evaluation for run in _runs(window)}
    mine = [run.tobytes() for window in calibration for run in _runs(window)]
    return sum(run in there for run in mine) / len(mine)


def _runs(window: torch.Tensor) -> Any:
    return window.unfold(0, NGRAM, 1).contiguous().numpy()


def _random(config: Any, count: int, window: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.get_text_config().vocab_size, (count, window), generator=generator)
