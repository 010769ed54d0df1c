"""A linear, norm or embedding of which every token uses the weights of its route."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from graftwork import UserError
from graftwork_kernels.dispatch import fused
from graftwork_kernels.masked_delta_linear import masked_delta_linear
from torch import nn

from graftwork_mmer.routed.deltas import Deltas, Masks
from graftwork_mmer.routed.plan import Key, Plan


class Shared:
    """What all routed modules of a model share: the deltas, the plan of the running forward pass, the mode."""

    def __init__(self, deltas: Deltas, *, materialize: bool) -> None:
        self.deltas, self.materialize = deltas, materialize
        self.plan: Plan | None = None


class MaskedDelta(nn.Module):
    """``y_t = f(x_t; W0 + m_r(t) U)`` for a module f that treats every token by itself.

    W0 is shared by all routes; a weight is formed in float32 and rounded once, to the model's precision. Tokens of one
    key are computed together. By default weights are formed for every call, with ``materialize`` once per key. On a GPU
    those of a linear are formed in registers, by :func:`graftwork_kernels.masked_delta_linear.masked_delta_linear`,
    unless a key is a mean.

    Args:
        inner: the module of the base, kept and frozen.
        names: from the module's own parameters to their names in the model, those that have deltas.
        shared: see :class:`Shared`.
        text: use the weights of text tokens for all, as embeddings and head do.
    """

    def __init__(self, inner: nn.Module, names: Mapping[str, str], shared: Shared, *, text: bool) -> None:
        super().__init__()
        self.inner = inner
        self.names, self.text = dict(names), text
        self._shared = [shared]  # In a list: it is no part of this module.
        self._dense: dict[Key, dict[str, torch.Tensor]] = {}
        self._last: tuple[tuple[Key, ...], Masks | None] | None = None

    def requires_grad_(self, requires_grad: bool = True) -> MaskedDelta:
        """Refuse to be trained.

        Raises:
            RuntimeError: ``requires_grad`` is true.
        """
        if requires_grad:
            raise RuntimeError(
                "a merged model is frozen: masks belong to the weights that they were made for"
            )
        super().requires_grad_(False)
        return self

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, for code that looks at its precision or device."""
        return self.inner.get_parameter("weight")

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the outputs of all tokens (the first two axes of ``x`` are rows and tokens)."""
        shared = self._shared[0]
        plan = shared.plan
        if plan is None:
            raise RuntimeError("a routed module runs inside its RoutedModel only")
        for name in self.names:
            if self.inner.get_parameter(name).requires_grad:
                raise RuntimeError("a merged model is frozen, and one of its weights asks for gradients")
        # The head sees the last tokens only where no other logits are wanted.
        places = plan.text[:, None].expand(x.shape[:2]) if self.text else plan.tokens
        masks = self._masks(plan.keys, x)
        if masks is not None:
            return self._fused(masks, plan.keys, x, places)
        used = places.unique().tolist()
        if len(used) == 1:
            return self._call(plan.keys[used[0]], x, *args, **kwargs)
        rows, found = x.flatten(0, 1), None
        flat = places.flatten()
        for place in used:
            mine = (flat == place).nonzero().squeeze(1)
            # Rows get an axis of their own back: a module may tell its own axes by it.
            out = self._call(plan.keys[place], rows[mine].unsqueeze(0), *args, **kwargs).squeeze(0)
            if found is None:
                found = out.new_empty(len(rows), *out.shape[1:])
            found[mine] = out
        assert found is not None
        return found.unflatten(0, x.shape[:2])

    def _masks(self, keys: tuple[Key, ...], x: torch.Tensor) -> Masks | None:
        """Return the masks of a linear's weight where a kernel takes them as they are, those of the last keys."""
        shared = self._shared[0]
        full = self.names.get("weight")
        if shared.materialize or full is None or not isinstance(self.inner, nn.Linear) or not fused(x):
            return None
        if self._last is None or self._last[0] != keys:
            self._last = (keys, shared.deltas.masks(full, keys))
        return self._last[1]

    def _fused(
        self, masks: Masks, keys: tuple[Key, ...], x: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """Compute all tokens at once; no weight of a key is formed in memory."""
        weight, bias = self.inner.get_parameter("weight"), self.inner.bias
        out = masked_delta_linear(x, weight, masks.merged, masks.words, places.contiguous(), masks.scales)
        if bias is None:
            return out
        biases = [self.inner.get_parameter("bias").detach()] * len(keys)
        if "bias" in self.names:
            own = [self._shared[0].deltas.rebuilt(self.names["bias"], key, biases[0]) for key in keys]
            biases = [base if mine is None else mine for base, mine in zip(biases, own, strict=True)]
        return out + torch.stack(biases)[places]

    def _call(self, key: Key, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weights = self.weights(key)
        if not weights:
            return self.inner(x, *args, **kwargs)
        return torch.func.functional_call(self.inner, weights, (x, *args), kwargs)

    def weights(self, key: Key) -> dict[str, torch.Tensor]:
        """Return the module's own parameters for a key, those that differ from the base's."""
        if key in self._dense:
            return self._dense[key]
        shared, found = self._shared[0], {}
        for name, full in self.names.items():
            weight = shared.deltas.rebuilt(full, key, self.inner.get_parameter(name).detach())
            if weight is not None:
                found[name] = weight
        if shared.materialize:
            self._dense[key] = found
        return found


def patch(model: nn.Module, shared: Shared) -> None:
    """Put a :class:`MaskedDelta` around every module of ``model`` whose parameters have deltas.

    Raises:
        UserError: a parameter of the deltas that the model lacks or has in another shape, or that belongs to a
            module that does not treat tokens one by one.
    """
    deltas = shared.deltas
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tables = [getattr(model, get)() for get in ("get_input_embeddings", "get_output_embeddings")]
    left = set(deltas.shapes)
    for name, module in list(model.named_modules()):
        own = {
            key: names[id(parameter)]
            for key, parameter in module.named_parameters(recurse=False)
            if names[id(parameter)] in deltas.shapes
        }
        if not own:
            continue
        for key, full in own.items():
            shape = tuple(module.get_parameter(key).shape)
            rows, columns = deltas.shapes[full]
            if module.get_parameter(key).numel() != rows * columns or shape[-1] not in (columns, 1):
                raise UserError(
                    f"the deltas of '{full}' are {rows} x {columns}, and the model's parameter is {shape}; they are "
                    f"for another model"
                )
        if any(True for _ in module.children()) or any(module.get_parameter(k).ndim > 2 for k in own):
            raise UserError(
                f"'{name}' ({type(module).__name__}) does not treat tokens one by one, so they cannot be routed in it"
            )
        left -= set(own.values())
        parent, _, child = name.rpartition(".")
        routed = MaskedDelta(module, own, shared, text=any(module is table for table in tables))
        setattr(model.get_submodule(parent), child, routed)
    if left:
        raise UserError(f"the model has no parameter '{min(left)}', which the deltas are for")
