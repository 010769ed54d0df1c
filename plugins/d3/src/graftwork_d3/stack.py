"""Find a model's decoder layers, refuse those that cannot be left out, and put another ``forward`` on layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from graftwork import UserError
from graftwork.generate.passes import inner_model

Forward = Callable[..., Any]
# Where decoders keep their layers: Llama, Mistral, Qwen and most others; GPT-2 and kin; GPT-NeoX.
_NAMES = ("layers", "h")
# Each of these keeps keys and values of its own for every token that it reads.
_PLAIN = {"full_attention", "sliding_attention", "chunked_attention"}


def layer_count(config: Any) -> int:
    """Return the number of decoder layers, after refusing kinds of model whose layers depend on each other.

    Raises:
        UserError: an encoder-decoder, layers that share keys and values, layers with a recurrent state.
    """
    kind = config.model_type
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "add_cross_attention", False):
        raise UserError(f"d3 leaves out layers of decoder-only models; {kind} reads an encoder's output too")
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    if shared:
        first = text.num_hidden_layers - shared
        raise UserError(
            f"d3 cannot leave out layers of {kind}: layer {first} and those after it read the keys and values of "
            f"earlier layers"
        )
    for number, layer_type in enumerate(getattr(text, "layer_types", None) or ()):
        if layer_type not in _PLAIN:
            raise UserError(
                f"d3 cannot leave out layers of {kind}: layer {number} ({layer_type}) has a state of its own that "
                f"every token must go through"
            )
    return text.num_hidden_layers


def find_decoder(model: Any) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    """Return the decoder that ``model`` runs (inside PEFT's wrapper, if any) and its layers.

    Raises:
        UserError: the model is of a kind whose layers cannot be left out, or not known to be otherwise.
    """
    inner = inner_model(model)
    kind = inner.config.model_type
    count = layer_count(inner.config)
    if getattr(inner, "_is_stateful", False):
        raise UserError(
            f"d3 cannot leave out layers of {kind}: it has layers with a recurrent state that every token must go "
            f"through"
        )
    configs = getattr(model, "peft_config", {})
    if any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
        raise UserError("d3 cannot be used with an adapter that learns virtual tokens")
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    for name in _NAMES:
        found = getattr(decoder, name, None)
        if isinstance(found, torch.nn.ModuleList) and len(found) == count:
            layers = list(found)
            break
    else:
        raise UserError(
            f"d3 does not find the decoder layers of {kind} ({type(inner).__name__}): it looks for a list named "
            f"{' or '.join(_NAMES)} of {count} layers in its decoder"
        )
    for number, layer in enumerate(layers):
        if not any(getattr(part, "layer_idx", None) == number for part in layer.modules()):
            raise UserError(
                f"d3 cannot leave out layers of {kind}: layer {number} ({type(layer).__name__}) does not keep keys "
                f"and values under its own number"
            )
    return decoder, layers


def check_removable(config: Any, removable: Iterable[int]) -> None:
    """Refuse to leave out the layer whose cache stands for all others of its kind of attention.

    Masks and positions are computed once per kind, from the cache of its first layer.

    Raises:
        UserError: names the layer and the first one that may be left out.
    """
    types = getattr(config.get_text_config(decoder=True), "layer_types", None) or ["full_attention"]
    firsts = {types.index(one): one for one in set(types)}
    for layer in sorted(removable):
        if layer in firsts:
            raise UserError(
                f"layer {layer} cannot be left out: the masks of all layers with {firsts[layer]} come from its "
                f"cache; let the flex block start at {max(firsts) + 1} or later"
            )


@contextlib.contextmanager
def other_forward(
    layers: Mapping[int, torch.nn.Module], make: Callable[[int, Forward], Forward]
) -> Iterator[None]:
    """Let ``make(number, forward)`` stand in for the ``forward`` of each layer, and put back what was there.

    What was there is the very same object where a layer had a ``forward`` of its own, and nothing where it had
    its class's.
    """
    before: list[tuple[torch.nn.Module, Any]] = []
    missing = object()
    try:
        for number, layer in layers.items():
            before.append((layer, layer.__dict__.get("forward", missing)))
            layer.__dict__["forward"] = make(number, layer.forward)
        yield
    finally:
        for layer, forward in before:
            if forward is missing:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = forward
