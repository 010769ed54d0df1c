"""Run a model at the depth that each step of decoding is given, and leave no trace afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from graftwork import UserError
from graftwork.generate import touching_layers
from graftwork.generate.passes import inner_model

from graftwork_d3.policies import Plan
from graftwork_d3.report import DepthReport
from graftwork_d3.stack import Forward, check_removable, find_decoder, other_forward


class Gate:
    """Whether a layer is left out."""

    __slots__ = ("off",)

    def __init__(self) -> None:
        self.off = False


class DepthController(contextlib.AbstractContextManager["DepthController"]):
    """Make layers of ``model`` an identity, as ``plan`` says for each step; the list of layers keeps its length.

    Between entering and leaving: the prompt is read with all layers; before every later pass of one token a row,
    :meth:`step` says which one it is. All rows of a batch are at the same step. A layer that is left out still
    appears in ``output_hidden_states``, as a copy of the layer before.

    Every pass checks that the layers it runs hold the same number of tokens. ``report`` counts the passes.

    Raises:
        UserError: a model whose layers cannot be left out; a plan for another number of layers, or one in which
            a layer comes back; another patch of the same layers. Inside: no cache, several tokens in one step.
    """

    def __init__(self, model: Any, plan: Plan, *, owner: str = "d3") -> None:
        self.model = model
        self.plan = plan
        self.owner = owner
        self.decoder, self.layers = find_decoder(model)
        count = len(self.layers)
        if plan.layers != count:
            raise UserError(f"the schedule is for {plan.layers} layers, the model has {count}")
        if not plan.nested:
            raise UserError(
                "a layer comes back after it was left out, and would lack the keys of the tokens between; leave out "
                "layers in a fixed order and never bring one back"
            )
        check_removable(inner_model(model).config, plan.removable)
        self.gates = {number: Gate() for number in sorted(plan.removable)}
        self.report = DepthReport(plan)
        self._off: frozenset[int] = frozenset()
        self._told: int | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> DepthController:
        with contextlib.ExitStack() as stack:
            stack.enter_context(touching_layers(self.model, self.owner, "leaves out", self.plan.removable))
            if self.gates:
                layers = {number: self.layers[number] for number in self.gates}
                stack.enter_context(other_forward(layers, self._gated))
                # A graph that was compiled without the gates, or with them, is not to be used on the other side.
                self._forget_compiled()
                stack.callback(self._forget_compiled)
            handle = self.decoder.register_forward_pre_hook(self._before, with_kwargs=True)
            stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._set(frozenset())
        self._told = None
        self._stack.close()

    def step(self, step: int) -> None:
        """Say that the coming pass is forward number ``step`` after the prompt's (0: the prompt's own)."""
        self._told = step
        self._set(self.plan.skipped(step))
        if step > 0:
            self.report.count(step)

    def _set(self, off: frozenset[int]) -> None:
        # Sets of a plan are kept objects: as long as the depth stays, this is one comparison.
        if off is self._off:
            return
        for number in off ^ self._off:
            self.gates[number].off = number in off
        self._off = off

    def _gated(self, number: int, forward: Forward) -> Forward:
        gate = self.gates[number]

        def gated(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return hidden_states if gate.off else forward(hidden_states, *args, **kwargs)

        return gated

    def _forget_compiled(self) -> None:
        inner_model(self.model).__dict__.pop("_compiled_call", None)

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            # The gates are the graph's guards; lengths and counts are not for a graph to look at.
            return
        told, self._told = self._told, None
        cache = named.get("past_key_values")
        tokens = named.get("input_ids")
        tokens = named.get("inputs_embeds") if tokens is None else tokens
        count = int((args[0] if tokens is None else tokens).shape[1])
        # transformers' continuous batching hands its own cache of pages over by this name.
        if named.get("cache") is not None:
            raise UserError(
                "d3 cannot be used in continuous batching: the rows of one pass are at different steps, and so at "
                "different depths"
            )
        if named.get("use_cache") is False or (told and cache is None):
            raise UserError(
                "d3 needs the cache of keys and values: without it every step reads the whole text again, at one "
                "depth; leave use_cache=false out"
            )
        if told and count != 1:
            raise UserError(
                f"d3 gives every step one token a row, and this pass reads {count}; assisted decoding and other loops "
                f"of several tokens a step cannot be used with it"
            )
        if told is None:
            if count == 1 and _length(cache, 0) > 0:
                raise RuntimeError("step(t) was not called before a pass that reads one token")
            self._set(frozenset())
        self._check_lengths(cache)

    def _check_lengths(self, cache: Any) -> None:
        """Raise if a layer that is about to run lacks tokens which layer 0 has."""
        if cache is None or not hasattr(cache, "layers"):
            return
        first = _length(cache, 0)
        # Reading the length of a fixed-size cache makes an accelerator wait.
        if not isinstance(first, int):
            return
        for number in self.gates:
            if number not in self._off and _length(cache, number) != first:
                raise UserError(
                    f"layer {number} holds {_length(cache, number)} tokens where layer 0 holds {first}: the cache was "
                    f"filled at a smaller depth; begin the text again with a new cache"
                )


def _length(cache: Any, number: int) -> Any:
    """Return how many tokens layer ``number`` holds: an int, or a tensor for a cache of fixed size."""
    return 0 if cache is None else cache.get_seq_length(number)


@contextlib.contextmanager
def depth_decay(model: Any, plan: Plan) -> Iterator[DepthController]:
    """Enter a :class:`DepthController`: ``with depth_decay(model, schedule) as depth: ... depth.step(t)``."""
    with DepthController(model, plan) as controller:
        yield controller
