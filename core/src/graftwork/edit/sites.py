"""Where edits are written: output projections of attention and MLP, found by structure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from graftwork.edit.errors import ArchitectureError
from graftwork.transform.structure import find_layers

Kind = Literal["attn", "mlp"]
KINDS: tuple[Kind, ...] = ("attn", "mlp")


@dataclass(frozen=True)
class Site:
    """A linear memory: ``value = W key`` (plus its bias), added to the residual stream.

    Attributes:
        layer: number of its decoder layer, from 0.
        kind: attention output projection or MLP down projection.
        name: of the module in the model, such as ``model.layers.3.mlp.down_proj``.
        inner: of the module within its layer, such as ``mlp.down_proj``.
        module: nn.Linear, or transformers' Conv1D, which stores W transposed.
        h, d: W is h x d; keys have d entries and values h.
    """

    layer: int
    kind: Kind
    name: str
    inner: str
    module: nn.Module
    h: int
    d: int

    @property
    def parameter(self) -> str:
        """Name of the weight in the model."""
        return f"{self.name}.weight"

    @property
    def matrix(self) -> torch.Tensor:
        """W as h x d; a view of the weight as it is stored."""
        return oriented(self.module)

    @property
    def order(self) -> tuple[int, int]:
        """Sorts sites by depth; attention comes before the MLP of its layer."""
        return self.layer, KINDS.index(self.kind)

    def digest(self) -> str:
        """Return the sha256 of the weight's bytes, as h x d, with its shape and dtype."""
        return tensor_digest(self.matrix)


def oriented(module: nn.Module) -> torch.Tensor:
    """Return the weight of a Linear or a Conv1D as outputs x inputs, a view."""
    weight: Any = module.weight
    weight = weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's shape, dtype and values."""
    found = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    raw = tensor.detach().cpu().contiguous().view(torch.uint8)
    found.update(raw.numpy().data)
    return found.hexdigest()


def find_sites(model: Any, kinds: Iterable[Kind] = KINDS, layers: Sequence[int] | None = None) -> list[Site]:
    """Return the sites of a decoder by depth, of the ``kinds`` and ``layers`` (all where None).

    In every layer the part with linears whose name speaks of attention, and the one that does not, have one last linear
    that gives as many outputs as the model is wide.

    Raises:
        ArchitectureError: none is found in a layer (with the layer's linears), mixtures of experts, rounded or shared
            weights, an adapter around a linear, a layer that the model does not have.
    """
    name, modules = find_layers(model)
    width = int(model.config.get_text_config().hidden_size)
    chosen = range(len(modules)) if layers is None else sorted(set(layers))
    wanted = set(kinds)
    found: list[Site] = []
    for index in chosen:
        if not 0 <= index < len(modules):
            raise ArchitectureError(
                f"the model has layers 0 to {len(modules) - 1}, and an edit asks for layer {index}"
            )
        layer = modules[index]
        for kind in KINDS:
            if kind not in wanted:
                continue
            inner = _projection(layer, kind, width, f"{name}.{index}")
            module = layer.get_submodule(inner)
            h, d = oriented(module).shape
            found.append(Site(index, kind, f"{name}.{index}.{inner}", inner, module, h, d))
    _check_own(model, found)
    return found


def site_by_name(sites: Iterable[Site]) -> dict[str, Site]:
    """Return the sites by the names of their modules."""
    return {site.name: site for site in sites}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _projection(layer: nn.Module, kind: Kind, width: int, where: str) -> str:
    """Return the name within ``layer`` of the projection of this kind back to the residual stream."""
    groups: dict[str, list[str]] = {"": []}
    for child, part in layer.named_children():
        if _is_linear(part):
            groups[""].append(child)
            continue
        inside = [f"{child}.{name}" for name, module in part.named_modules() if name and _is_linear(module)]
        if inside:
            groups[child] = inside
    candidates = [
        members
        for child, members in groups.items()
        if members and (("att" in child.lower()) == (kind == "attn")) and "cross" not in child.lower()
    ]
    listed = ", ".join(name for members in groups.values() for name in members) or "none"
    if len(candidates) != 1:
        raise ArchitectureError(
            f"'{where}' has {len(candidates)} parts that could be its {kind}, and one is wanted; its linears: {listed}"
        )
    members = candidates[0]
    if len({name.rpartition(".")[0] for name in members}) > 1:
        raise ArchitectureError(
            f"'{where}': its {kind} is made of several parts (a mixture of experts, or an adapter that is not "
            f"merged), so there is no one place to write to; its linears: {listed}"
        )
    fitting = [name for name in members if oriented(layer.get_submodule(name)).shape[0] == width]
    if not fitting:
        raise ArchitectureError(
            f"'{where}': its {kind} has no linear that gives {width} outputs; its linears: {listed}"
        )
    inner = fitting[-1]
    weight: Any = layer.get_submodule(inner).weight
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ArchitectureError(
            f"'{where}.{inner}' holds rounded weights ({weight.dtype}); edit the model before it is rounded"
        )
    return inner


def _check_own(model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse weights that stand in two places: an edit of one would be an edit of both."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for site in sites:
        weight: Any = site.module.weight
        names = owners.get(id(weight), [])
        if len(names) > 1:
            raise ArchitectureError(
                f"'{site.parameter}' is shared with '{next(one for one in names if one != site.parameter)}', and an "
                f"edit of one would change both"
            )
