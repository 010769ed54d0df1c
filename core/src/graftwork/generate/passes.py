"""Tell plugins about every forward pass of a decode loop, transformers' own loops included."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from graftwork.hookspecs import ForwardPass

BeforeForward = Callable[[ForwardPass], None]


def inner_model(model: Any) -> Any:
    """Return the model that ``generate`` runs: what is inside, where PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def watching(
    model: torch.nn.Module, callbacks: Sequence[BeforeForward], prompt_tokens: int
) -> Iterator[None]:
    """Call every callback before each forward pass of one ``model.generate`` call entered inside.

    ``prompt_tokens`` is the (padded) length of the prompt, 1 for the decoder of an encoder-decoder. A prefill
    in chunks counts as one step, of which only the last pass predicts. Without callbacks nothing is installed.
    """
    if not callbacks:
        yield
        return
    seen = 0

    def hook(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal seen
        known = (named.get(name) for name in ("decoder_input_ids", "input_ids", "inputs_embeds"))
        tokens = next((tensor for tensor in known if tensor is not None), None)
        if tokens is None:
            tokens = arguments[0]
        # Without a cache every pass reads the whole text again.
        before = seen if named.get("past_key_values") is not None else 0
        seen = before + int(tokens.shape[1])
        step = seen - prompt_tokens
        coming = ForwardPass(max(step, 0), step <= 0, step >= 0, slice(0, int(tokens.shape[0])), slice(0, 0))
        for callback in callbacks:
            callback(coming)

    handle = inner_model(model).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
