"""Where a model keeps its decoder layers, its final norm and its head; layers count from 1 to L."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graftwork import UserError
from graftwork.generate.passes import inner_model
from torch import nn

_LISTS = ("layers", "h", "blocks")
_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f")


def decoder_of(model: Any) -> nn.Module:
    """Return the module whose forward pass runs through all layers.

    Raises:
        UserError: an encoder-decoder, or a model that does not say what its decoder is.
    """
    inner = inner_model(model)
    config = getattr(inner, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"CaLE enhances a decoder-only model; {type(inner).__name__} has an encoder")
    if config is None or not hasattr(inner, "get_decoder"):
        raise UserError(f"CaLE does not know the layers of {type(inner).__name__}: it has no get_decoder()")
    return inner.get_decoder()


def layers_of(model: Any) -> nn.ModuleList:
    """Return the decoder layers of ``model``, PEFT-wrapped or not.

    Raises:
        UserError: see :func:`decoder_of`; or the stack is under none of the names known here.
    """
    decoder = decoder_of(model)
    count = inner_model(model).config.get_text_config().num_hidden_layers
    for name in _LISTS:
        found = getattr(decoder, name, None)
        if isinstance(found, nn.ModuleList) and len(found) == count:
            return found
    raise UserError(
        f"CaLE does not know the layers of {type(inner_model(model)).__name__}: its decoder has no list of "
        f"{count} layers named {', '.join(_LISTS)}"
    )


def final_norm(model: Any) -> nn.Module:
    """Return the norm between the last layer and the head.

    Raises:
        UserError: there is none under the names known here.
    """
    decoder = decoder_of(model)
    for name in _NORMS:
        found = getattr(decoder, name, None)
        if isinstance(found, nn.Module):
            return found
    raise UserError(
        f"the logit lens does not know the final norm of {type(inner_model(model)).__name__}: its decoder has "
        f"none of {', '.join(_NORMS)}"
    )


def check_layer(layer: int, count: int) -> None:
    """Refuse a layer that is not among 1..L-1, for a model of ``count`` layers.

    Raises:
        UserError: out of range; of the last layer it is said why.
    """
    if layer == count:
        raise UserError(
            f"layer {layer} is the last one, where scaling has no effect after the final norm; "
            f"choose 1 to {count - 1}"
        )
    if not 1 <= layer < count:
        raise UserError(f"layer {layer} is not in a model of {count} layers; choose 1 to {count - 1}")


def model_id(model: Any) -> str:
    """Return how a model is known in ``cale.json``: its hub id, the name of its folder, or its type."""
    config = inner_model(model).config
    name = str(getattr(config, "_name_or_path", "") or "")
    return (Path(name).name if Path(name).exists() else name) or config.model_type
