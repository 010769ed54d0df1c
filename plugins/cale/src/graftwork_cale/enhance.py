"""Strengthen the output of one decoder layer while a model runs.

With h_l the residual stream after layer l and s the strength (1 changes nothing):

    amplify    h_l <- s h_l
    growth     h_l <- h_(l-1) + s (h_l - h_(l-1))
    residual   h_L <- h_L + (s - 1) h_l             just before the final norm

The idea of amplifying a layer or adding it at the end is the paper's; the formulas are ours.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from types import TracebackType
from typing import Any, Literal

import torch
from graftwork import ForwardPass, UserError
from graftwork.generate import touching_layers
from graftwork.generate.passes import inner_model
from torch import nn

from graftwork_cale.layers import check_layer, decoder_of, layers_of
from graftwork_cale.positions import Continued, Positions, Streams, Where

Variant = Literal["amplify", "residual", "growth"]
Strength = float | torch.Tensor


def amplified(hidden: torch.Tensor, strength: Strength) -> torch.Tensor:
    """Return s h. ``hidden``: B x T x d; ``strength``: one for all, or one per row (B)."""
    return (hidden * _per_row(strength)).to(hidden.dtype)


def added(hidden: torch.Tensor, other: torch.Tensor, strength: Strength) -> torch.Tensor:
    """Return h + (s - 1) other; shapes as in :func:`amplified`."""
    return (hidden + (_per_row(strength) - 1) * other).to(hidden.dtype)


class LayerEnhancement:
    """Enhance layer ``layer`` (1 to L-1) of ``model`` as long as the context is entered.

    ``strength`` is a number, or a tensor with one per row of the batch. ``positions``: from the last one of
    the prompt on (``predicting``), or ``all``; padding is never touched. Works inside plain
    ``model.generate``; a decode loop that knows more about its passes calls :meth:`before_forward`.
    Managers on different layers may be nested in any order. For ``streams`` and ``continued`` see
    :class:`graftwork_cale.positions.Positions`.

    Raises:
        UserError: an unknown model, a layer out of range, a strength that is not positive and finite, a
            compiled model; on entering, a layer that is being enhanced already.
    """

    def __init__(
        self,
        model: Any,
        layer: int,
        strength: Strength,
        variant: Variant = "amplify",
        positions: Where = "predicting",
        *,
        streams: Streams = "main",
        continued: Continued = "refuse",
    ) -> None:
        layers = layers_of(model)
        check_layer(layer, len(layers))
        _check_strength(strength)
        self.model = model
        self.layer = layer
        self.strength = strength
        self.variant: Variant = variant
        self.positions = Positions(positions, streams, continued)
        self._decoder = decoder_of(model)
        self._names = list(inspect.signature(self._decoder.forward).parameters)
        self._own, self._last = layers[layer - 1], layers[-1]
        self._stack = contextlib.ExitStack()
        self._mask: torch.Tensor | None = None
        self._kept: torch.Tensor | None = None

    def __enter__(self) -> LayerEnhancement:
        _check_not_compiled(self.model)
        count = len(layers_of(self.model))
        effect = f"enhances (as layer {self.layer} of 1 to {count})"
        with contextlib.ExitStack() as stack:
            # Core counts layers from 0.
            stack.enter_context(touching_layers(self.model, "cale", effect, [self.layer - 1]))
            if self.variant == "residual":
                # What is added before the final norm is right whatever else was added there.
                adds = touching_layers(self.model, "cale", "adds to", [count - 1], composes=True)
                stack.enter_context(adds)
                self._hook(stack, self._last.register_forward_hook(self._after_last))
            self._hook(stack, self._decoder.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hook(stack, self._own.register_forward_hook(self._after_own, with_kwargs=True))
            self._hook(stack, self._decoder.register_forward_hook(self._after, always_call=True))
            self.positions.forget()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._stack.close()
        self._forget()
        self.positions.forget()

    @staticmethod
    def _hook(stack: contextlib.ExitStack, handle: Any) -> None:
        stack.callback(handle.remove)

    def before_forward(self, coming: ForwardPass) -> None:
        """Take what a decode loop says about the pass that comes next."""
        self.positions.tell(coming)

    def _before(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = {**dict(zip(self._names, arguments, strict=False)), **named}
        if given.get("cu_seq_lens_q") is not None:
            raise UserError(
                "CaLE enhances rows that hold one text each, and these hold several (continuous batching or packing); "
                "use generate"
            )
        tokens: Any = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if tokens is not None:
            cache = given.get("past_key_values")
            self._mask = self.positions.mask(tokens, given.get("attention_mask"), cache)

    def _after_own(
        self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> Any:
        hidden = _hidden(output)
        if self._mask is None:
            return output
        if self.variant == "residual":
            self._kept = hidden
            return output
        if self.variant == "amplify":
            return self._replaced(output, amplified(hidden, self._strength(hidden)))
        before = arguments[0] if arguments else named["hidden_states"]
        return self._replaced(output, added(hidden, hidden - before, self._strength(hidden)))

    def _after_last(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if self._kept is None:
            return output
        hidden = _hidden(output)
        return self._replaced(output, added(hidden, self._kept.to(hidden.device), self._strength(hidden)))

    def _strength(self, hidden: torch.Tensor) -> Strength:
        return self.strength.to(hidden.device) if isinstance(self.strength, torch.Tensor) else self.strength

    def _replaced(self, output: Any, enhanced: torch.Tensor) -> Any:
        assert self._mask is not None
        chosen = torch.where(self._mask.to(enhanced.device)[..., None], enhanced, _hidden(output))
        return (chosen, *output[1:]) if isinstance(output, tuple) else chosen

    def _after(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.positions.made(getattr(output, "past_key_values", None))
        self._forget()

    def _forget(self) -> None:
        self._mask = self._kept = None


def _hidden(output: Any) -> torch.Tensor:
    """Return the hidden states of what a layer returns: a tensor, or the first of several things."""
    return output[0] if isinstance(output, tuple) else output


def _per_row(strength: Strength) -> Strength:
    return strength.view(-1, 1, 1) if isinstance(strength, torch.Tensor) else strength


def _check_strength(strength: Strength) -> None:
    values = strength.flatten().tolist() if isinstance(strength, torch.Tensor) else [strength]
    for value in values:
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"strength = {value}: a positive finite number is expected; 1 changes nothing")


def _check_not_compiled(model: Any) -> None:
    """Refuse a model whose compiled graph would not know of the hooks."""
    inner = inner_model(getattr(model, "_orig_mod", model))
    compiled = hasattr(model, "_orig_mod") or hasattr(inner, "_compiled_call")
    if compiled or getattr(inner, "_compiled_call_impl", None) is not None:
        raise UserError(
            f"{type(inner).__name__} was compiled before CaLE was set, and its graph would go on without it; "
            f"enter the context before compiling, or load the model again"
        )
