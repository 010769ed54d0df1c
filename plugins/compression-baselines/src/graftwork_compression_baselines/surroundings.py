"""What stands around a linear in a decoder layer: who reads the same input, and where scales can be folded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from graftwork import UserError
from graftwork.transform.modules import CompressedLinear, Factored
from torch import nn

if TYPE_CHECKING:
    from graftwork.transform.block import Block
    from graftwork.transform.structure import Place


def readers(block: Block, names: Sequence[str]) -> list[list[str]]:
    """Return ``names`` in groups of those that read the same tensor, in the order in which the layer calls them.

    Raises:
        UserError: one is never called.
    """
    seen: dict[int, list[str]] = {}
    # Kept until all were seen, so that no address is used twice.
    inputs: list[torch.Tensor] = []

    def hook(name: str) -> Any:
        def see(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs.append(arguments[0])
            seen.setdefault(id(arguments[0]), []).append(name)

        return see

    handles = [block.get(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        hidden, kwargs = next(iter(block.batches()))
        with torch.no_grad():
            block.run(hidden, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    missing = set(names) - {name for group in seen.values() for name in group}
    if missing:
        raise UserError(f"'{block.name}.{min(missing)}' was never called in the layer's forward pass")
    return list(seen.values())


def shared(block: Block, group: Sequence[str]) -> dict[str, str]:
    """Return for every linear of a group that reads one tensor the first that sees it as it does, rotated or not."""
    found: dict[str, str] = {}
    firsts: list[str] = []
    for name in group:
        same = (first for first in firsts if _same_rotation(block.get(first), block.get(name)))
        found[name] = next(same, name)
        if found[name] == name:
            firsts.append(name)
    return found


def moments(block: Block, group: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the second moments (in x in, float64) of what the linears of such a group multiply, one tensor for all
    that see the same."""
    owner = shared(block, group)
    found = block.second_moments(list(dict.fromkeys(owner.values())))
    return {name: found[first] for name, first in owner.items()}


def reading(block: Block, name: str) -> str:
    """Return the linear of ``name`` that reads its input: itself, or the first of its factors."""
    return f"{name}.0" if isinstance(block.get(name), Factored) else name


def writing(block: Block, name: str) -> str:
    """Return the linear of ``name`` that makes its output: itself, or the last of its factors."""
    return f"{name}.1" if isinstance(block.get(name), Factored) else name


def inputs_of(block: Block, name: str, plugin: str) -> Any:
    """Return the linear whose columns stand for the inputs of ``name``, to be scaled or rotated in place.

    Raises:
        UserError: it is rounded, or rotates its inputs.
    """
    linear = block.get(reading(block, name))
    _open(block, linear, name, plugin)
    if isinstance(linear, CompressedLinear) and linear.rotation is not None:
        raise UserError(
            f"'{block.name}.{name}' rotates its inputs, so '{plugin}' cannot scale or rotate them any more; name it "
            f"before the plugin that rotates"
        )
    return linear


def outputs_of(block: Block, name: str, plugin: str) -> Any:
    """Return the linear whose rows stand for the outputs of ``name``, to be scaled or rotated in place.

    Raises:
        UserError: it is rounded.
    """
    linear = block.get(writing(block, name))
    _open(block, linear, name, plugin)
    return linear


@torch.no_grad()
def fold_scales(block: Block, place: Place, scales: torch.Tensor, plugin: str) -> None:
    """Divide the input of a place by ``scales`` (per output channel of its source), without a trace in the output.

    The source's outputs are divided and the columns of the place's linears multiplied, in float64.

    Raises:
        UserError: a linear is rounded or rotates its inputs, or the norm is of a kind that is not known.
    """
    targets = [inputs_of(block, name, plugin) for name in place.linears]
    scales = scales.double()
    if place.kind == "norm":
        norm = block.get(place.source)
        write_gain(norm, read_gain(norm, f"{block.name}.{place.source}") / scales)
    else:
        source = outputs_of(block, place.source, plugin)
        put(source.weight, source.weight.double() / scales[:, None])
        if source.bias is not None:
            put(source.bias, source.bias.double() / scales)
    spread = place.spread(scales)
    for linear in targets:
        put(linear.weight, linear.weight.double() * spread)


def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Write ``value`` into ``parameter``, rounded to its dtype."""
    parameter.data.copy_(value)


# ---------------------------------------------------------------------- norms


def read_gain(norm: nn.Module, name: str) -> torch.Tensor:
    """Return what a norm multiplies each channel with (d, float64): its weight, or one more than its weight.

    Raises:
        UserError: it does something else.
    """
    weight = _weight(norm, name).detach().double()
    return weight + _offset(norm, name)


@torch.no_grad()
def write_gain(norm: nn.Module, gain: torch.Tensor) -> None:
    """Make the norm multiply each channel with ``gain`` (d); a bias is divided as the gain is."""
    before = read_gain(norm, "norm")
    offset = _offset(norm, "norm")
    bias = getattr(norm, "bias", None)
    if bias is not None:
        put(bias, torch.where(before == 0, bias.double(), bias.double() * gain / before))
    put(_weight(norm, "norm"), gain - offset)


def centres(norm: nn.Module) -> bool:
    """Return whether a norm takes the mean away or adds a bias, so that a rotation does not pass through it."""
    gain = read_gain(norm, "norm")
    with torch.no_grad():
        # A mean that is taken away leaves nothing of a constant.
        constant = norm(_weight(norm, "norm").new_ones(1, len(gain))).double()
    return bool(constant.abs().max() < 1e-3 * gain.abs().max()) or getattr(norm, "bias", None) is not None


def _weight(norm: nn.Module, name: str) -> torch.Tensor:
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1:
        raise UserError(f"'{name}' has no weight per channel, so no scale can be folded into it")
    return weight


@torch.no_grad()
def _offset(norm: nn.Module, name: str) -> float:
    """Return what the norm adds to its weight (0 or 1), found by asking it."""
    weight = _weight(norm, name)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, len(weight), generator=generator, dtype=torch.float64)
    probe = probe / probe.square().mean(-1, keepdim=True).sqrt()
    bias = getattr(norm, "bias", None)
    found = norm(probe.to(weight)).cpu().double() - (0 if bias is None else bias.cpu().double())
    middle = probe - probe.mean(-1, keepdim=True)
    middle = middle / middle.square().mean(-1, keepdim=True).sqrt()
    for normal in (probe, middle):
        for offset in (0.0, 1.0):
            expected = normal * (weight.cpu().double() + offset)
            if (found - expected).norm() <= 2e-2 * expected.norm():
                return offset
    raise UserError(
        f"'{name}' ({type(norm).__name__}) is no norm that multiplies each channel with its weight, so no scale can be "
        f"folded into it"
    )


def _open(block: Block, linear: Any, name: str, plugin: str) -> None:
    if getattr(linear, "is_quantized", False):
        raise UserError(
            f"'{block.name}.{name}' is rounded already, so '{plugin}' cannot change it; what scales, rotates or "
            f"factorises comes before what rounds"
        )


def _same_rotation(one: Any, other: Any) -> bool:
    first, second = getattr(one, "rotation", None), getattr(other, "rotation", None)
    if first is None or second is None:
        return first is second
    if first.block != second.block or not torch.equal(first.signs, second.signs):
        return False
    if first.orthogonal is None or second.orthogonal is None:
        return first.orthogonal is second.orthogonal
    return torch.equal(first.orthogonal, second.orthogonal)
