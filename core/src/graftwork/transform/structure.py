"""What a decoder is made of: its layers, what stands around them, and which linears read the same input."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from graftwork.errors import UserError
from graftwork.models import auto_class, is_encoder_decoder


@dataclass(frozen=True)
class Place:
    """Linears of a layer that read the same input, and what makes that input.

    Attributes:
        name: ``qkv``, ``o``, ``gate_up`` or ``down``.
        linears: names within the layer.
        source: the norm, or the linear, whose output channels are the input channels of the place.
        kind: what ``source`` is.
        repeats: every output channel of the source stands behind so many inputs (query heads that share a value
            head); head by head, see :meth:`spread`.
        head_dim: of the attention, where ``repeats`` counts.
    """

    name: Literal["qkv", "o", "gate_up", "down"]
    linears: tuple[str, ...]
    source: str
    kind: Literal["norm", "linear"]
    repeats: int = 1
    head_dim: int = 1

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Return values per output channel of the source (last axis) as values per input of the place."""
        if self.repeats == 1:
            return values
        heads = values.unflatten(-1, (-1, self.head_dim))
        return heads.repeat_interleave(self.repeats, dim=-2).flatten(-2)

    def gathered(self, values: torch.Tensor) -> torch.Tensor:
        """Return values per input of the place, averaged over the inputs that one source channel feeds."""
        if self.repeats == 1:
            return values
        return values.unflatten(-1, (-1, self.repeats, self.head_dim)).mean(-2).flatten(-2)


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """Return the model with its parameters on the meta device and its buffers real.

    Raises:
        UserError: an encoder-decoder.
    """
    from accelerate import init_empty_weights

    if is_encoder_decoder(config):
        raise UserError(
            f"transform works on decoders layer by layer, and {config.model_type} is an encoder-decoder"
        )
    with init_empty_weights(include_buffers=False):
        return auto_class(config).from_config(copy.deepcopy(config), dtype=dtype).eval()


def find_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the decoder layers.

    Raises:
        UserError: none is found.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise UserError(
        f"a {model.config.model_type} model has no list of {count} layers to transform one by one"
    )


def find_norm(model: Any) -> str:
    """Return the name of the norm after the last layer.

    Raises:
        UserError: none is found.
    """
    name, _ = find_layers(model)
    parent, _, last = name.rpartition(".")
    seen = False
    for child, module in model.get_submodule(parent).named_children():
        if seen and any(p.ndim == 1 for p in module.parameters(recurse=False)):
            return f"{parent}.{child}" if parent else child
        seen = seen or child == last
    raise UserError(f"a {model.config.model_type} model has no norm after its last layer")


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Return the plain linears of a layer by their names within it."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_NORMS = {"qkv": "input_layernorm", "gate_up": "post_attention_layernorm"}
# Where a norm follows the attention or the MLP, too, the norm before the MLP has another name.
_NORM_BEFORE_MLP = "pre_feedforward_layernorm"


def places(layer: nn.Module, config: Any) -> list[Place]:
    """Return the four places of a layer of the llama family (q/k/v, o, gate/up, down).

    Raises:
        UserError: the layer is of another make.
    """
    modules = dict(layer.named_modules())
    wanted = (*_ATTENTION, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    before_mlp = _NORM_BEFORE_MLP if _NORM_BEFORE_MLP in modules else _NORMS["gate_up"]
    missing = [name for name in (*wanted, _NORMS["qkv"], before_mlp) if name not in modules]
    if missing:
        raise UserError(
            f"a layer of a {config.model_type} model has no '{missing[0]}', so scales and rotations of its inputs "
            f"have no known place to go to; use methods that change each linear by itself"
        )
    text = config.get_text_config()
    heads = text.num_attention_heads
    shared = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return [
        Place("qkv", _ATTENTION, _NORMS["qkv"], "norm"),
        Place("o", ("self_attn.o_proj",), "self_attn.v_proj", "linear", heads // shared, head_dim),
        Place("gate_up", ("mlp.gate_proj", "mlp.up_proj"), before_mlp, "norm"),
        Place("down", ("mlp.down_proj",), "mlp.up_proj", "linear"),
    ]


class _Entered(Exception):
    """Ends a forward pass before the final norm and the head."""


class _Passes(nn.Module):
    """Stands where a decoder layer was: notes what the layer is called with and passes the hidden states on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that it is not a submodule.
        self._layer = (layer,)
        self.calls: list[tuple[torch.Tensor, dict[str, Any]]] = []
        self.gives: torch.Tensor | None = None
        self.last = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Some decoders ask a layer for its kind of attention.
            return getattr(super().__getattribute__("_layer")[0], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            names = list(inspect.signature(self._layer[0].forward).parameters)[1 : 1 + len(args)]
            kwargs = {**dict(zip(names, args, strict=True)), **kwargs}
        self.calls.append((hidden_states, kwargs))
        if self.last and self.gives is None:
            raise _Entered
        return hidden_states if self.gives is None else self.gives


@contextlib.contextmanager
def without_layers(model: Any) -> Iterator[list[Any]]:
    """Run ``model`` with its layers taken out; yields what stands in their places."""
    name, layers = find_layers(model)
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    stand_ins = [_Passes(layer) for layer in layers]
    setattr(owner, last, nn.ModuleList(stand_ins))
    try:
        yield stand_ins
    finally:
        setattr(owner, last, layers)


def enter(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Return the hidden states before the first layer (B x L x d) and what every layer is called with.

    Final norm and head are not run and may be on the meta device.
    """
    with torch.no_grad(), without_layers(model) as stand_ins:
        stand_ins[-1].last = True
        with contextlib.suppress(_Entered):
            model(input_ids=ids, use_cache=False)
    return stand_ins[0].calls[0][0], [one.calls[0][1] for one in stand_ins]


def leave(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits (B x L x V) that final norm and head make of the last layer's output.

    The table of token embeddings is not read and may be on the meta device.
    """
    with torch.no_grad(), without_layers(model) as stand_ins:
        stand_ins[-1].last = True
        stand_ins[-1].gives = hidden
        return model(inputs_embeds=hidden, use_cache=False).logits


def first_tensor(output: Any) -> torch.Tensor:
    """Return the hidden states of what a layer returned."""
    return output[0] if isinstance(output, Sequence) else output
