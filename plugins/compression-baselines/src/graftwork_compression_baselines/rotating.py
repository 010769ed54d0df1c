"""Rotations by signed Hadamard matrices: of a linear's own input, of the residual stream, and of attention heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from graftwork import UserError
from graftwork.transform.hadamard import (
    hadamard,
    hadamard_transposed,
    has_hadamard,
    random_signs,
    rotation_block,
)
from graftwork.transform.modules import Rotation
from torch import nn

from graftwork_compression_baselines.surroundings import (
    centres,
    inputs_of,
    outputs_of,
    put,
    read_gain,
    reading,
    write_gain,
)

if TYPE_CHECKING:
    from graftwork.transform.block import Block
    from graftwork.transform.outer import Outer

LEAST = 16
"""A smaller Hadamard matrix spreads an outlier over too few channels to help."""


def make_rotation(size: int, seed: int, block: int | Literal["auto"], name: str) -> Rotation:
    """Return a rotation of ``size`` channels: random signs, then Hadamard matrices along the diagonal.

    Raises:
        UserError: ``block`` does not fit, or no matrix of some size does.
    """
    if block == "auto":
        chosen = rotation_block(size)
        if chosen < min(LEAST, size):
            raise UserError(
                f"the {size} channels of '{name}' have no Hadamard matrix: the largest that divides them is of order "
                f"{chosen}; set plugins.hadamard.block={chosen} to use it even so, or leave the rotation out"
            )
    else:
        chosen = block
        if size % chosen or not has_hadamard(chosen):
            raise UserError(
                f"plugins.hadamard.block = {chosen} gives no rotation of the {size} channels of '{name}': it must "
                f"divide them and be the order of a Hadamard matrix, {rotation_block(size)} at most"
            )
    return Rotation(chosen, random_signs(size, seed))


def turned(rotation: Rotation, values: torch.Tensor) -> torch.Tensor:
    """Return ``values`` (..., d) rotated, in float64."""
    at = Rotation(rotation.block, rotation.signs.to(values.device))
    return at(values.detach().double())


def turned_back(rotation: Rotation, values: torch.Tensor) -> torch.Tensor:
    """Return what rotates to ``values`` (..., d), in their own dtype or float32, if that is wider."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    if rotation.orthogonal is not None:
        blocks, size, _ = rotation.orthogonal.shape
        parts = wide.unflatten(-1, (blocks, size))
        wide = torch.einsum("...nl,nkl->...nk", parts, rotation.orthogonal.to(wide)).flatten(-2)
    return hadamard_transposed(wide, rotation.block) * rotation.signs.to(wide)


# ---------------------------------------------------------------------- online


def rotate_inputs(block: Block, name: str, rotation: Rotation) -> None:
    """Let the linear ``name`` rotate its input at run time, with a weight that belongs to it.

    Raises:
        UserError: it is rounded or rotates its input already.
    """
    inputs_of(block, name, "hadamard")
    linear = block.compressed(reading(block, name))
    assert linear.weight is not None
    put(linear.weight, turned(rotation, linear.weight))
    linear.rotated(rotation)


# ---------------------------------------------------------------------- the residual stream


def rotate_outer(outer: Outer, rotation: Rotation) -> None:
    """Turn the residual stream at both ends: what the embedding writes, and what the head reads.

    The final norm's weight goes into the head, which gets a table of its own.

    Raises:
        UserError: the final norm takes the mean away, so that a rotation does not pass through it.
    """
    _rms(outer.norm, "the final norm")
    outer.untie()
    gain = read_gain(outer.norm, "the final norm")
    put(outer.head.weight, turned(rotation, outer.head.weight.double() * gain))
    write_gain(outer.norm, torch.ones_like(gain))
    put(outer.embedding.weight, turned(rotation, outer.embedding.weight))


def rotate_residual(block: Block, rotation: Rotation) -> None:
    """Turn the residual stream in one layer: norms are folded into their readers, readers and writers turned.

    Raises:
        UserError: a norm takes the mean away or stands behind attention or MLP, or a linear is rounded or rotated.
    """
    places = {place.name: place for place in block.places()}
    known = {places["qkv"].source, places["gate_up"].source}
    for name, module in block.module.named_children():
        vectors = [p for p in module.parameters(recurse=False) if p.ndim == 1]
        if vectors and name not in known:
            raise UserError(
                f"'{block.name}.{name}' stands behind attention or MLP, and no rotation of the residual stream passes "
                f"through it; set plugins.hadamard.place=online"
            )
    for place in (places["qkv"], places["gate_up"]):
        norm = block.get(place.source)
        _rms(norm, f"{block.name}.{place.source}")
        gain = read_gain(norm, f"{block.name}.{place.source}")
        for name in place.linears:
            linear = inputs_of(block, name, "hadamard")
            put(linear.weight, turned(rotation, linear.weight.double() * gain))
        write_gain(norm, torch.ones_like(gain))
    for name in (*places["o"].linears, *places["down"].linears):
        linear = outputs_of(block, name, "hadamard")
        put(linear.weight, turned(rotation, linear.weight.t()).t())
        if linear.bias is not None:
            put(linear.bias, turned(rotation, linear.bias))


def rotate_heads(block: Block, size: int | None = None) -> None:
    """Turn the values of every head by a Hadamard matrix: rows of v_proj, and columns of o_proj with them.

    ``size`` of the matrix; the largest that divides the head if not given.

    Raises:
        UserError: a linear is rounded or rotates its input.
    """
    place = next(place for place in block.places() if place.name == "o")
    size = size or rotation_block(place.head_dim)
    source = outputs_of(block, place.source, "hadamard")
    put(source.weight, hadamard(source.weight.double().t(), size).t())
    if source.bias is not None:
        put(source.bias, hadamard(source.bias.double(), size))
    for name in place.linears:
        linear = inputs_of(block, name, "hadamard")
        put(linear.weight, hadamard(linear.weight.double(), size))


def _rms(norm: nn.Module, name: str) -> None:
    if centres(norm):
        raise UserError(
            f"{name} takes the mean away or adds a bias, and no rotation of the residual stream passes through it; set "
            f"plugins.hadamard.place=online"
        )
