"""What flows through a model at chosen tokens: keys of sites, and states of the residual stream."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from graftwork.edit.encoding import BUDGET, Row, batches, pad, rows_of
from graftwork.edit.requests import Request
from graftwork.edit.sites import Site
from graftwork.errors import UserError
from graftwork.transform.structure import find_layers, first_tensor


class _Enough(Exception):
    """Ends a forward pass when all that was wanted has been seen."""


def layer_point(model: Any, layer: int) -> dict[str, nn.Module]:
    """Return the decoder layer ``layer`` by its name: its output is the residual stream behind it."""
    name, layers = find_layers(model)
    return {f"{name}.{layer}": layers[layer]}


def read(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    inputs: Mapping[str, nn.Module] | None = None,
    outputs: Mapping[str, nn.Module] | None = None,
    anchor: Literal["anchor", "last"] = "anchor",
    budget: int = BUDGET,
) -> dict[str, torch.Tensor]:
    """Return inputs and outputs of modules at each row's anchor (or last prompt token), float32, rows x dim.

    The pass ends at the last module that is asked for. A name may be asked for once.

    Raises:
        UserError: a module that the forward pass never calls.
    """
    inputs, outputs = inputs or {}, outputs or {}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in (*inputs, *outputs)}
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, tensor: torch.Tensor) -> None:
        seen[name] = tensor
        if len(seen) == len(found):
            raise _Enough

    with contextlib.ExitStack() as stack:
        for name, module in inputs.items():

            def before(_: Any, args: tuple[Any, ...], name: str = name) -> None:
                keep(name, args[0])

            stack.callback(module.register_forward_pre_hook(before).remove)
        for name, module in outputs.items():

            def after(_: Any, args: Any, output: Any, name: str = name) -> None:
                keep(name, first_tensor(output))

            stack.callback(module.register_forward_hook(after).remove)
        for some in batches(rows, budget):
            batch = pad(some, tokenizer, model)
            seen.clear()
            with torch.no_grad(), contextlib.suppress(_Enough):
                model(**batch.inputs)
            at = batch.shift + torch.tensor([getattr(row, anchor) for row in some], device=batch.shift.device)
            for name in found:
                if name not in seen:
                    raise UserError(f"'{name}' was never called in the model's forward pass")
                tensor = seen[name]
                lines = torch.arange(len(some), device=tensor.device)
                found[name].append(tensor[lines, at.to(tensor.device)].detach().float().cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def keys(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    sites: Sequence[Site],
    prefixes: Sequence[str] = (),
    *,
    variants: int = 0,
    average: Literal["groups", "mean"] = "groups",
) -> dict[str, torch.Tensor]:
    """Return the keys of requests at sites (name: n x d, float64), averaged over the rows of each request.

    ``groups``: the bare prompt counts one half and all other rows together the other (MEMIT's code); ``mean``: all
    rows count alike.
    """
    rows, weights = [], []
    for request in requests:
        mine = rows_of(tokenizer, request, prefixes, variants=variants, target=False)
        rows += mine
        others = len(mine) - 1
        if average == "groups" and others:
            weights.append(torch.tensor([0.5, *[0.5 / others] * others], dtype=torch.float64))
        else:
            weights.append(torch.full((len(mine),), 1 / len(mine), dtype=torch.float64))
    seen = read(model, tokenizer, rows, inputs={site.name: site.module for site in sites})
    counts = [len(one) for one in weights]
    return {
        name: torch.stack(
            [weight @ part.double() for weight, part in zip(weights, values.split(counts), strict=True)]
        )
        for name, values in seen.items()
    }


def states(model: Any, tokenizer: Any, requests: Sequence[Request], layer: int) -> torch.Tensor:
    """Return the residual stream behind ``layer`` at the last subject token of the bare prompts (n x h, float64)."""
    rows = [rows_of(tokenizer, request, target=False)[0] for request in requests]
    (values,) = read(model, tokenizer, rows, outputs=layer_point(model, layer)).values()
    return values.double()
