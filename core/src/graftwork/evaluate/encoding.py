"""Prompts as the tokens that a model is asked with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from jinja2 import TemplateError

from graftwork.errors import UserError

# What is entered around a batch: nothing, or what plugins want there.
Contexts = Callable[[], Iterable[AbstractContextManager[Any]]]


def encode_prompt(tokenizer: Any, prompt: Any) -> list[int]:
    """Return the tokens of a prompt (a string or chat messages), up to where the answer begins.

    Raises:
        UserError: the prompt is empty, or a chat that the tokenizer has no template for or whose template
            refuses it.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt, verbose=False)["input_ids"]
    elif not tokenizer.chat_template:
        raise UserError("the items are chats, but the tokenizer has no chat template; use data.prompt: plain")
    else:
        # A prompt that ends with words of the assistant is to be continued, as TRL does in training.
        continued = prompt[-1]["role"] == "assistant"
        try:
            ids = tokenizer.apply_chat_template(
                prompt,
                add_generation_prompt=not continued,
                continue_final_message=continued,
                return_dict=True,
            )["input_ids"]
        except TemplateError as error:
            raise UserError(f"the chat template refuses the messages: {error}") from error
    if not ids:
        raise UserError("a prompt is empty; every test item needs something to answer")
    return ids


def pad_token(tokenizer: Any) -> int:
    """Return the token to fill up with. It is masked, so any serves where the tokenizer has none to spare."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
