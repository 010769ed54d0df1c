"""A decoder layer with scales and rotations at its four places: as it is while they are learned, and folded.

At a place (q/k/v, o, gate/up, down) with input x (d), scales s and rotation R::

    x~ = (x * s) R        W~ = (W / s) R        y = Qa(x~) Qw(W~)^T + bias

s is made by what makes x: the norm, or the rows of v_proj or up_proj. Where values are rounded in the cache, the rows
of v_proj are also turned by a Hadamard matrix per head, and the columns of o_proj with them. The same function,
:func:`transformed`, makes the weights while they are learned and when they are folded.

A linear that an earlier plugin has factored is two: ``NAME.0`` reads the place's input, ``NAME.1`` writes the output
and reads numbers in between, which are rounded as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from graftwork import UserError
from graftwork.transform.hadamard import hadamard, rotation_block
from graftwork.transform.modules import CompressedLinear, Factored, Rotation
from graftwork.transform.scheme import ActivationScheme, WeightScheme
from graftwork.transform.structure import Place, places
from torch import nn
from torch.nn import functional as F

from graftwork_bdq.diagonal import Diagonal, energy_sigma, fold_into, pooled, scales, smooth_sigma
from graftwork_bdq.fake import fake_tokens, fake_weight
from graftwork_bdq.options import BdqOptions
from graftwork_bdq.rotation import Cayley, fixed_rotation

CLIP_START = 4.0
"""Clip factors are sigmoids of a number that starts here: 0.982 (OmniQuant, FlatQuant)."""


@dataclass(frozen=True)
class Statistics:
    """Of one place's input over the calibration tokens: sums of squares (d), and the largest sizes (d)."""

    energy: torch.Tensor | None = None
    largest: torch.Tensor | None = None


def transformed(
    weight: torch.Tensor,
    *,
    into: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    turned_into: int | None = None,
    turned_out: int | None = None,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """Return the weight (out x in) for inputs that were scaled and rotated and outputs that shall be.

    ``into`` (in) and ``out`` (out) are the scales of inputs and outputs, ``turned_into`` and ``turned_out`` the sizes
    of the Hadamard blocks that inputs and outputs are turned by after their scales, ``rotation`` is the place's own.
    """
    if into is not None:
        weight = weight / into
    if out is not None:
        weight = weight * out[:, None]
    if turned_into is not None:
        weight = hadamard(weight, turned_into)
    if turned_out is not None:
        weight = hadamard(weight.mT, turned_out).mT
    return weight if rotation is None else rotation(weight)


class PlaceTransform(nn.Module):
    """Scales, rotation and the clip factor of the activations of one place.

    Raises:
        UserError: no rotation of the kind asked for fits the place.
    """

    def __init__(self, place: Place, sigma: torch.Tensor, size: int, options: BdqOptions, seed: int) -> None:
        super().__init__()
        self.place, self.size = place, size
        self.diagonal = Diagonal(sigma, options.diag)
        self.fixed = fixed_rotation(
            options.rotation, size, seed, block=options.rotation_size, name=place.linears[0]
        )
        self.cayley = (
            Cayley(size, options.learned_block, place.linears[0]) if options.learns_rotation else None
        )
        self.scheme: ActivationScheme = options.activations
        learns = options.learns_clips and self.scheme.rounds
        self.clip = nn.Parameter(torch.tensor(CLIP_START)) if learns else None
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def at_source(self) -> torch.Tensor:
        """Return s per output channel of the source (n)."""
        return scales(self.diagonal())

    def at_input(self) -> torch.Tensor:
        """Return s per input channel of the place (d)."""
        return self.place.spread(self.at_source())

    def rotation(self) -> Rotation | None:
        """Return R as it is now, with gradients."""
        if self.cayley is None:
            return self.fixed
        turned = self.cayley()
        if self.fixed is None:
            return Rotation(1, torch.ones(self.size, dtype=torch.int8, device=turned.device), turned)
        return Rotation(self.fixed.block, self.fixed.signs, turned)

    def ratio(self) -> torch.Tensor | None:
        """Return the share of each token's range that is kept, or None for all of it."""
        return None if self.clip is None else self.clip.sigmoid()

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``Qa(x~)``; linears that read the same tensor share one."""
        if self._last is not None and self._last[0] is x:
            return self._last[1]
        scale = self.at_input() if self.place.kind == "norm" else None
        found = fake_tokens(x, self.scheme, scale, self.rotation(), self.ratio())
        self._last = (x, found)
        return found

    def forget(self) -> None:
        """Let go of the last input, and of its graph."""
        self._last = None


class LearnedLinear(nn.Module):
    """A linear while its surroundings are learned; not rounded and not scaled when ``owner.active`` is off."""

    def __init__(self, name: str, linear: Any, owner: LayerTransform) -> None:
        super().__init__()
        # In a tuple: the layer owns them.
        self._parts = (name, linear, owner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        name, linear, owner = self._parts
        if not owner.active:
            return linear(x)
        reader = owner.reader(name)
        seen = fake_tokens(x, owner.options.activations) if reader is None else reader.seen(x)
        weight, bias = owner.weight(name, linear, seen.dtype)
        return F.linear(seen, owner.rounded(name, weight), bias).to(x.dtype)


class LayerTransform(nn.Module):
    """The places of one decoder layer, and the clip factors of its weights.

    Args:
        layer: the decoder layer, whose weights are read.
        config: of the model.
        options: of the plugin.
        statistics: of each place's input, where the scales start from them.
        seed: of the rotations' signs.
        rounds: whether weights are rounded while the rest is learned.

    Raises:
        UserError: the layer is of another make, a linear was rotated or rounded before, or no rotation fits.
    """

    def __init__(
        self,
        layer: nn.Module,
        config: Any,
        options: BdqOptions,
        statistics: Mapping[str, Statistics],
        seed: int,
        *,
        rounds: bool = True,
    ) -> None:
        super().__init__()
        self.options, self.seed = options, seed
        self.layer = (layer,)
        self.active = True
        found = places(layer, config)
        parts: dict[str, PlaceTransform] = {}
        self._reader: dict[str, str] = {}
        self._writer: dict[str, str] = {}
        for number, place in enumerate(found):
            for name in place.linears:
                first, last = ends(layer, name)
                for one in dict.fromkeys((first, last)):
                    _check_plain(layer.get_submodule(one), one)
                self._reader[first], self._writer[name] = place.name, last
            sigma = starting_sigma(layer, place, statistics.get(place.name), options)
            size = layer.get_submodule(ends(layer, place.linears[0])[0]).weight.shape[1]
            parts[place.name] = PlaceTransform(place, sigma, size, options, seed * 7 + number)
        self.places = nn.ModuleDict(parts)
        self._follower = {self._writer[place.source]: place.name for place in found if place.kind == "linear"}
        self.turned = _value_block(found, options)
        self.weights: WeightScheme = options.weights
        self.rounds = rounds and self.weights.rounds and options.quantizer != "none"
        self.clips = nn.ParameterDict()
        if options.learns_clips and self.rounds:
            for name in self.linears():
                rows, columns = layer.get_submodule(name).weight.shape
                groups = columns // (self.weights.group or columns)
                self.clips[_key(name)] = nn.Parameter(torch.full((2, rows, groups), CLIP_START))
        self.to(next(layer.parameters()).device)

    # ------------------------------------------------------------ parts

    def place(self, name: str) -> PlaceTransform:
        """Return the transform of the place ``name``."""
        part = self.places[name]
        assert isinstance(part, PlaceTransform)
        return part

    def reader(self, linear: str) -> PlaceTransform | None:
        """Return the place whose input ``linear`` reads; None for the second factor of a weight."""
        return self.place(self._reader[linear]) if linear in self._reader else None

    def linears(self, place: str | None = None) -> tuple[str, ...]:
        """Return the linears of a place, or of all, by their names within the layer, factors in their order."""
        (layer,) = self.layer
        wanted = [place] if place is not None else list(self.places)
        names = (name for part in wanted for name in self.place(part).place.linears)
        return tuple(one for name in names for one in dict.fromkeys(ends(layer, name)))

    def weight(
        self, name: str, linear: Any, dtype: torch.dtype = torch.float64
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight and bias of ``linear`` for the scaled and rotated inputs and outputs."""
        reader, follower = self.reader(name), self._follower.get(name)
        out = None if follower is None else self.place(follower).at_source().to(dtype)
        turned_out = self.turned if follower == "o" else None
        weight = transformed(
            linear.weight.to(dtype),
            into=None if reader is None else reader.at_input().to(dtype),
            out=out,
            turned_into=self.turned if reader is not None and reader.place.name == "o" else None,
            turned_out=turned_out,
            rotation=None if reader is None else reader.rotation(),
        )
        bias = linear.bias
        if bias is None:
            return weight, None
        return weight, transformed(bias.to(dtype)[:, None], out=out, turned_out=turned_out).squeeze(1)

    def kept(self, name: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the shares of the largest and the least weights that are kept (out x groups), or None."""
        if _key(name) not in self.clips:
            return None, None
        high, low = self.clips[_key(name)].sigmoid()
        return high, low

    def rounded(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as rounding would leave it, where weights are rounded while the rest is learned."""
        return fake_weight(weight, self.weights, *self.kept(name)) if self.rounds else weight

    def groups(self) -> list[dict[str, Any]]:
        """Return parameter groups for an optimizer: clip factors learn at a rate of their own."""
        named = dict(self.named_parameters())
        clips = [value for name, value in named.items() if "clip" in name]
        rest = [value for name, value in named.items() if "clip" not in name]
        groups = [
            {"params": rest, "lr": self.options.lr},
            {"params": clips, "lr": self.options.clip_lr},
        ]
        return [group for group in groups if group["params"]]

    # ------------------------------------------------------------ while it is learned

    @contextlib.contextmanager
    def student(self) -> Iterator[None]:
        """Let the layer compute with the scales, rotations and rounding as they are now."""
        (layer,) = self.layer
        originals = {name: layer.get_submodule(name) for name in self.linears()}
        try:
            for name, linear in originals.items():
                _put(layer, name, LearnedLinear(name, linear, self))
            yield
        finally:
            for name, linear in originals.items():
                _put(layer, name, linear)
            self.forget()

    def forget(self) -> None:
        """Free what places remember of the last forward pass."""
        for name in self.places:
            self.place(name).forget()

    # ------------------------------------------------------------ afterwards

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all that was learned, by the parameters' names."""
        return {name: value.detach() for name, value in self.named_parameters()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what :meth:`tensors` returned."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(tensors[name])

    @torch.no_grad()
    def fold(self) -> dict[str, CompressedLinear]:
        """Put scales and rotations into the layer's own weights, in place; without rounding it computes the same.

        Returns the linears by their names within the layer. Everything is computed in float64.
        """
        (layer,) = self.layer
        exact = {name: self.weight(name, layer.get_submodule(name)) for name in self.linears()}
        for name in self.places:
            place = self.place(name)
            if place.place.kind == "norm":
                fold_into(layer.get_submodule(place.place.source), place.at_source(), "norm")
        made = {}
        for name, (weight, bias) in exact.items():
            old = layer.get_submodule(name)
            reader = self.reader(name)
            rotation = None if reader is None else reader.rotation()
            made[name] = CompressedLinear(
                weight.to(old.weight.dtype),
                None if bias is None else bias.to(old.bias.dtype),
                rotation=rotation,
            )
            _put(layer, name, made[name])
        return made


def starting_sigma(
    layer: nn.Module, place: Place, statistics: Statistics | None, options: BdqOptions
) -> torch.Tensor:
    """Return ln s (n, per output channel of the source) before anything is learned."""
    modules = [layer.get_submodule(name) for name in place.linears]
    stacked = torch.cat(
        [
            (one.dense_weight() if isinstance(one, Factored) else one.weight).detach().double()
            for one in modules
        ]
    )
    if options.start == "identity" or options.diag == "none":
        return place.gathered(stacked.new_zeros(stacked.shape[1]))
    assert statistics is not None
    if options.start == "energy":
        assert statistics.energy is not None
        # Under shared scales the optimum is that of the energies summed over who shares.
        return energy_sigma(pooled(statistics.energy, place), pooled(stacked.square().sum(0), place))
    assert statistics.largest is not None
    sigma = smooth_sigma(statistics.largest, stacked.abs().amax(0), options.alpha)
    return place.gathered(sigma)


def ends(layer: nn.Module, name: str) -> tuple[str, str]:
    """Return the names of the linear that reads the input of ``name`` and of the one that writes its output."""
    if isinstance(layer.get_submodule(name), Factored):
        return f"{name}.0", f"{name}.1"
    return name, name


def _value_block(found: list[Place], options: BdqOptions) -> int | None:
    """Return the Hadamard block that values are turned by, head by head, where the cache is rounded."""
    if not (options.kv.rounds and options.hadamard):
        return None
    return rotation_block(next(place.head_dim for place in found if place.name == "o"))


def _check_plain(linear: Any, name: str) -> None:
    if isinstance(linear, nn.Linear):
        return
    if isinstance(linear, CompressedLinear):
        if linear.is_quantized:
            raise UserError(f"'{name}' is rounded already; bdq comes before what rounds")
        if linear.rotation is None and linear.correction is None and linear.activations is None:
            return
        raise UserError(
            f"an earlier plugin rotates, rounds or corrects what goes into or out of '{name}'; bdq does so itself, "
            f"leave one of them out"
        )
    raise UserError(
        f"'{name}' is a {type(linear).__name__}, put there by an earlier plugin; bdq scales and rotates plain linears "
        f"and products of two"
    )


def _key(name: str) -> str:
    return name.replace(".", "-")


def _put(layer: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(layer.get_submodule(parent), last, module)
