"""Score a finished text as if it had been decoded at reduced depth, in one pass.

A layer is run on the tokens that go through it and on no others. Where sets of layers are nested these are the
prompt and the first tokens of the answer, and the result is that of decoding step by step. Where they are not,
a layer lacks the keys of the tokens that went past it: as in a decoder that drops them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from graftwork import UserError
from graftwork.generate.passes import inner_model

from graftwork_d3.policies import Plan
from graftwork_d3.stack import Forward, find_decoder, other_forward


@torch.no_grad()
def teacher_forced(
    model: Any,
    ids: torch.Tensor,
    prompt_tokens: int,
    plan: Plan | None = None,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the logits that predict the answer's tokens, and the one after: B x (A + 1) x V.

    ``ids``: B x (P + A), prompts padded on the left so that all end at P = ``prompt_tokens``; answers may be padded
    on the right with anything. ``attention_mask``: like ``ids``, 0 on the left's padding. Answer token t - 1 is read
    at step t of ``plan``; without a plan at full depth.

    Raises:
        UserError: a model whose layers cannot be left out, or flex attention, whose masks cannot be cut.
    """
    inner = inner_model(model)
    _, layers = find_decoder(model)
    if plan is not None and plan.layers != len(layers):
        raise UserError(f"the schedule is for {plan.layers} layers, the model has {len(layers)}")
    if inner.config._attn_implementation == "flex_attention":
        raise UserError("the one-pass score cannot cut the masks of flex_attention; load the model with sdpa")
    length = ids.shape[1]
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    runs = {} if plan is None else tokens_of_layers(plan, prompt_tokens, length)

    def make(number: int, forward: Forward) -> Forward:
        index = torch.tensor(runs[number], device=ids.device)

        def partial(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            some = forward(
                hidden_states[:, index],
                *(_cut(value, index, length) for value in args),
                **{name: _cut(value, index, length) for name, value in kwargs.items()},
            )
            return hidden_states.index_copy(1, index, some)

        return partial

    keep = length - prompt_tokens + 1
    takes = inspect.signature(inner.forward).parameters
    extra: dict[str, Any] = {"logits_to_keep": keep} if "logits_to_keep" in takes else {}
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with other_forward({number: layers[number] for number in runs}, make):
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **extra)
    return output.logits[:, -keep:]


def tokens_of_layers(plan: Plan, prompt_tokens: int, length: int) -> dict[int, list[int]]:
    """Return, for every layer that is ever left out, the positions that go through it."""
    steps = [plan.skipped(step) for step in range(1, length - prompt_tokens + 1)]
    prompt = list(range(prompt_tokens))
    return {
        layer: prompt + [prompt_tokens + place for place, gone in enumerate(steps) if layer not in gone]
        for layer in sorted(frozenset().union(*steps))
    }


def _cut(value: Any, index: torch.Tensor, length: int) -> Any:
    """Return what belongs to the tokens ``index`` of what a layer is given for all ``length`` of them."""
    if isinstance(value, tuple):
        return tuple(_cut(one, index, length) for one in value)
    if not isinstance(value, torch.Tensor):
        return value
    if value.dim() == 4 and value.shape[-2:] == (length, length):
        return value[:, :, index][..., index]
    if value.dim() > 1 and value.shape[1] == length:
        return value[:, index]
    return value
