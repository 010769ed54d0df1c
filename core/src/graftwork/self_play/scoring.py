"""Log-probabilities of answers under a checkpoint: in batches of like length, each computed once and kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from graftwork.distributed import barrier
from graftwork.evaluate.modes import evaluating
from graftwork.files import write_bytes_atomic
from graftwork.log_probs import TokenLogProbs, answer_log_probs
from graftwork.self_play.parts import in_parts

if TYPE_CHECKING:
    from graftwork.run import Run

PART = 256
"""Sequences that are scored before a file is written."""

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Prompt and answer, as tokens."""


class Scorer:
    """Log-probabilities under the model in memory, computed as the training does.

    Attributes:
        run: its plugins see every batch first, as they do in training.
        pad: token to fill up with; it is masked.
        batch_size: sequences in a forward pass.
        precision: of autocast, as the trainer's; None where it has none.
        token_log_probs: the arithmetic of the head, as the trainer's; see :func:`answer_log_probs`.
    """

    def __init__(
        self,
        run: Run,
        *,
        pad: int,
        batch_size: int,
        precision: torch.dtype | None = None,
        token_log_probs: TokenLogProbs | None = None,
    ) -> None:
        self.run = run
        self.pad = pad
        self.batch_size = batch_size
        self.precision = precision
        self.token_log_probs = token_log_probs

    def __call__(
        self, model: Any, sequences: Sequences, progress: Callable[[int], Any] | None = None
    ) -> list[float]:
        """Return the sum of log p(token | tokens before) over each answer (float32)."""
        order = sorted(range(len(sequences)), key=lambda k: -sum(map(len, sequences[k])))
        found = [0.0] * len(sequences)
        device = next(model.parameters()).device
        with evaluating(model), torch.no_grad(), self._autocast(device):
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                batch = pad_batch([sequences[k] for k in chosen], self.pad)
                batch = {key: value.to(device) for key, value in batch.items()}
                if self.run.plugins.implements("batch_begin"):
                    self.run.plugins.call("batch_begin", run=self.run, model=model, batch=batch)
                answer = batch.pop("completion_mask")
                values = answer_log_probs(
                    model, batch, answer, bare=model, token_log_probs=self.token_log_probs
                )
                for place, value in zip(chosen, values.tolist(), strict=True):
                    found[place] = value
                if progress:
                    progress(len(chosen))
        return found

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.precision is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.precision)


def pad_batch(sequences: Sequences, pad: int) -> dict[str, torch.Tensor]:
    """Return ``input_ids``, ``attention_mask`` and ``completion_mask`` (B x T), filled up on the right."""
    wide = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids = torch.full((len(sequences), wide), pad)
    mask, answers = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(sequences):
        length = len(prompt) + len(answer)
        ids[row, :length] = torch.tensor([*prompt, *answer])
        mask[row, :length] = 1
        answers[row, len(prompt) : length] = 1
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": answers}


class LogProbs:
    """Log-probabilities by checkpoint and by sequences, kept in ``folder``.

    A value is found again only where checkpoint and tokens are the same: other weights, another template,
    tokenizer or truncation are other keys.
    """

    def __init__(self, folder: Path, run: Run, scorer: Scorer) -> None:
        self.folder = folder
        self.run = run
        self.scorer = scorer
        if run.main:
            # A run may have been cut off between a file and the removal of its parts.
            for parts in folder.glob("*/*.parts"):
                if parts.with_suffix(".safetensors").exists():
                    shutil.rmtree(parts)

    def has(self, checkpoint: str, sequences: Sequences) -> bool:
        return self._path(checkpoint, sequences).exists()

    def get(self, checkpoint: str, sequences: Sequences) -> torch.Tensor:
        """Return what :meth:`compute` found (float32, one value per sequence)."""
        with safe_open(str(self._path(checkpoint, sequences)), framework="pt") as file:
            return file.get_tensor("log_probs")

    def compute(self, checkpoint: str, sequences: Sequences, model: Any, label: str) -> None:
        """Score ``sequences`` with ``model``, which holds ``checkpoint``; parts that are there are kept."""
        path = self._path(checkpoint, sequences)
        parts = path.with_suffix(".parts")
        with self.run.console.bar(len(sequences), label) as bar:

            def make(number: int) -> list[float]:
                some = sequences[number * PART : (number + 1) * PART]
                return self.scorer(model, some, bar.update)

            found = in_parts(parts, -(-len(sequences) // PART), make)
        if self.run.main:
            write_bytes_atomic(path, save({"log_probs": torch.tensor(found, dtype=torch.float32)}))
            shutil.rmtree(parts)
        barrier()

    def _path(self, checkpoint: str, sequences: Sequences) -> Path:
        return self.folder / checkpoint[:16] / f"{digest(sequences)[:16]}.safetensors"


def digest(value: Any) -> str:
    """Return the SHA-256 of ``value`` as JSON."""
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()
