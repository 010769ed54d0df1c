"""Prompts and answers as tokens for an encoder-decoder: two texts, where a decoder reads one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from graftwork.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, window: int | None = None) -> Dataset:
    """Return ``input_ids`` and ``attention_mask`` of the prompts, and ``labels`` of the answers.

    A prompt is what the tokenizer makes of it, just as when answers are asked for later. An answer loses the
    blank that joins it to the prompt of a decoder, and ends with the end token. Nothing is cut here:
    ``data.max_prompt_tokens`` cuts prompts while they are made, where it is known what may go.

    Raises:
        UserError: the items have no prompt and completion, or they are chats; or one is longer than
            ``window``, the positions that the model has (None: as many as it takes).
    """
    columns = dataset.column_names
    if not {"prompt", "completion"} <= set(columns):
        raise UserError(
            f"algorithm 'seq2seq' learns an answer to a prompt, but the items have the columns "
            f"{', '.join(columns)}; give them 'prompt' and 'completion'"
        )
    first = dataset[0] if len(dataset) else {}
    if any(isinstance(first.get(key), list) for key in ("prompt", "completion")):
        raise UserError(
            "algorithm 'seq2seq' takes prompts and answers as text, but the items are chats; "
            "use data.prompt: plain"
        )
    end = tokenizer.eos_token_id

    def tokens(batch: dict[str, list[str]]) -> dict[str, Any]:
        answers = [text.removeprefix(" ") for text in batch["completion"]]
        sources: Any = tokenizer(batch["prompt"], verbose=False)
        targets: Any = tokenizer(text_target=answers, verbose=False)
        labels = [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in targets["input_ids"]]
        longest = max(len(ids) for ids in [*sources["input_ids"], *labels])
        if window and longest > window:
            raise UserError(
                f"an item of {longest} tokens does not fit the model's window of {window}; "
                f"set data.max_prompt_tokens or data.max_words"
            )
        return {
            "input_ids": sources["input_ids"],
            "attention_mask": sources["attention_mask"],
            "labels": labels,
        }

    return dataset.map(tokens, batched=True, remove_columns=columns)


def right_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer, or a copy that pads on the right.

    Only there may the padding of an answer stand: the decoder has no mask for its own inputs, so it must not
    meet padding before it meets the answer.
    """
    if tokenizer.padding_side == "right":
        return tokenizer
    padder = copy.deepcopy(tokenizer)
    padder.padding_side = "right"
    return padder
