"""Plain text as windows of tokens: for perplexity, and for statistics of general text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from graftwork.data.layouts import read_tasks
from graftwork.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_windows(
    path: Path, tokenizer: PreTrainedTokenizerBase, window: int, limit: int | None = None
) -> torch.Tensor:
    """Return the first ``limit`` windows (all where None) of a text as token ids (windows x window).

    ``path`` is a text file, or a ``.jsonl`` file of ``{"text"}`` items, which are joined by empty lines. The
    windows do not overlap; what is left at the end is dropped.

    Raises:
        UserError: the file is missing, not UTF-8, or shorter than one window.
    """
    # Long texts are tokenised whole on purpose; the warning about the model's window does not apply.
    ids = torch.tensor(tokenizer(_read(path), verbose=False)["input_ids"], dtype=torch.long)
    count = min(len(ids) // window, limit or len(ids))
    if count == 0:
        raise UserError(f"text file '{path}' has {len(ids)} tokens, fewer than one window of {window}")
    return ids[: count * window].reshape(count, window)


def _read(path: Path) -> str:
    if path.suffix == ".jsonl":
        task = read_tasks(f"jsonl:{path}")[0]
        if task.form != "text":
            raise UserError(f"text file '{path}': its items are of the form '{task.form}', not 'text'")
        return "\n\n".join(item["text"] for item in task.train)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"text file '{path}' does not exist") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"text file '{path}' cannot be read as UTF-8 text: {error}") from None
