"""The additivity experiment, one decoder layer at a time: every setting's layer, its errors, and what it lets through.

All settings see the inputs of the unchanged model in calibration, so that they compress the same weights in the same
metric, one factorisation serves all, and errors compare. Each has its own evaluation text under way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from graftwork.transform.activations import Stream
from graftwork.transform.block import Block
from graftwork.transform.modules import CompressedLinear, Factored
from graftwork.transform.quantizer import Quantized
from graftwork.transform.scheme import FULL, ActivationScheme, WeightScheme
from graftwork.transform.structure import leave
from torch import nn

from graftwork_dam.adhesive import normalised, power_split
from graftwork_dam.choose import Choice, Problem, choose
from graftwork_dam.compress import targets
from graftwork_dam.errors import dot_norm, tensor_norm
from graftwork_dam.factor import Factors, choose_rank, factorise
from graftwork_dam.forward import Rounding
from graftwork_dam.layer import Layer, measure
from graftwork_dam.rounder import Rounder, Stored, values
from graftwork_dam.settings import AdditivityOptions, Setting, settings

SCALE_BITS = 16
POWERS = {"p0": 0.0, "p05": 0.5, "p1": 1.0}


@dataclass(frozen=True)
class LinearErrors:
    """Of one linear in one setting, as shares of ``||W||`` and ``||X W^T||``; and the bits it is stored in."""

    tensor: float
    dot: float
    bits: float


@dataclass
class Study:
    """What is compared, and what was found so far.

    Attributes:
        options: of the benchmark.
        windows: evaluation token ids (windows x window).
        settings: every compressed model.
        errors: by setting, then by the linear's full name.
        parameters: of the linears.
    """

    options: AdditivityOptions
    windows: torch.Tensor
    errors: dict[Setting, dict[str, LinearErrors]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.settings = settings(self.options)
        self.streams: dict[Setting | None, Stream] = {}

    def start(self, model: Any) -> None:
        """Embed the evaluation text for every setting, and for the unchanged model (None)."""
        for one in (None, *self.settings):
            stream = Stream("evaluation", self.windows, self.options.batch_size, device=model.device)
            stream.start(model)
            self.streams[one] = stream
            if one is not None:
                self.errors[one] = {}

    def block(self, block: Block) -> None:
        """Let every setting's evaluation text through its own form of a layer; the layer stays as it was."""
        modules = targets(block, [])
        layers = measure(block, modules, self.options.learn.tokens)
        self._pass(None, block)
        parts = {name: LinearStudy(layer, self.options) for name, layer in layers.items()}
        for name, layer in layers.items():
            self.parameters[f"{block.name}.{name}"] = layer.weight.numel()
        for one in self.settings:
            for name, part in parts.items():
                made = part.made(one)
                self.errors[one][f"{block.name}.{name}"] = part.errors(made)
                block.replace(name, made.module(modules[name], self._rounding(one)))
            self._pass(one, block)
            for name, module in modules.items():
                block.replace(name, module)

    def nll(self, model: Any, one: Setting | None) -> list[float]:
        """Return the mean negative log-likelihood per predicted token of every window, after the last layer."""
        stream, found = self.streams[one], []
        for number, ids in enumerate(stream.ids):
            hidden = stream.now.get(number).to(model.device)
            for row, window in zip(hidden, ids.to(model.device), strict=True):
                logits = leave(model, row[None])[0, :-1].float()
                found.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
        return found

    def _rounding(self, one: Setting) -> Rounding:
        return rounding(self.options, one)

    def _pass(self, one: Setting | None, block: Block) -> None:
        stream = self.streams[one]
        stream.compute(block.run)
        stream.step()


def rounding(options: AdditivityOptions, one: Setting) -> Rounding:
    """Return how a setting rounds; low rank alone rounds nothing, and ``ql`` keeps its factors in numbers."""
    plain = one.bits is None
    weights = WeightScheme(bits=FULL if plain or one.kind == "ql" or one.bits is None else one.bits)
    return Rounding(
        weights,
        ActivationScheme(bits=FULL if plain else options.activation_bits),
        ActivationScheme(bits=one.latents),
    )


@dataclass(frozen=True)
class Made:
    """A compressed weight as it is stored: one matrix, or a left and a right factor."""

    parts: tuple[Stored, ...]

    def product(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight that it stands for (m x n)."""
        parts = [values(part).to(dtype) for part in self.parts]
        return parts[0] if len(parts) == 1 else parts[0] @ parts[1]

    def bits(self) -> int:
        """Return the bits of codes and scales; numbers count 16 each."""
        return sum(
            part.codes.numel() * part.scheme.bits + part.scale.numel() * SCALE_BITS
            if isinstance(part, Quantized)
            else part.numel() * SCALE_BITS
            for part in self.parts
        )

    def module(self, linear: Any, how: Rounding) -> nn.Module:
        """Return what runs in the place of ``linear``."""
        kind = linear.weight.dtype
        if len(self.parts) == 2 and how.latents.rounds:
            left, right = (values(part).to(kind) for part in self.parts)
            return Factored(
                CompressedLinear(right, activations=how.inputs),
                CompressedLinear(left, linear.bias, activations=how.latents),
            )
        wide = torch.promote_types(kind, torch.float32)
        return CompressedLinear(self.product(wide).to(kind), linear.bias, activations=how.inputs)


class LinearStudy:
    """One linear in all settings; what several of them need is computed once."""

    def __init__(self, layer: Layer, options: AdditivityOptions) -> None:
        self.layer, self.options = layer, options
        rows, columns = layer.weight.shape
        self.ranks = {
            ratio: choose_rank(rows, columns, ratio=ratio, rank=None, group=None, name=layer.name)
            for ratio in options.ratios
        }
        self.norms = tensor_norm(layer.weight), dot_norm(layer.weight, layer.moments)
        self._factors: dict[int | None, Factors] = {}
        self._whole: dict[int, Stored] = {}
        self._best: dict[tuple[float | None, int, int], Choice] = {}

    def made(self, one: Setting) -> Made:
        """Return the weight in a setting."""
        layer = self.layer
        if one.kind == "q":
            return Made((self._rounded(self._bits(one)),))
        if one.kind == "l":
            factors = self._of_weight(None, one)
            return Made((factors.left, factors.scaled))
        bits = self._bits(one)
        rounder = self._rounder(bits)
        if one.kind == "q_of_l":
            product = self._of_weight(None, one).product().to(layer.weight)
            return Made((rounder(product, layer.moments, layer.name),))
        if one.kind in ("ql", "qlq"):
            factors = self._of_weight(bits, one)
            if one.kind == "ql":
                return Made((factors.left, factors.scaled))
            return self._split(factors, power_split(factors.values, 0.5), rounder)
        factors = self._of_weight(None, one)
        if one.kind in POWERS:
            return self._split(factors, power_split(factors.values, POWERS[one.kind]), rounder)
        learn = self.options.learn
        problem = Problem(layer, factors, rounding(self.options, one))
        key = (one.ratio, bits, one.latents)
        if key not in self._best:
            self._best[key] = choose(problem, "grid", rounder, steps=0, lr=learn.lr)
        chosen = self._best[key]
        if one.kind == "learned":
            chosen = choose(problem, chosen.name, rounder, steps=learn.steps, lr=learn.lr)
        return self._split(factors, chosen.log_d, rounder)

    def errors(self, made: Made) -> LinearErrors:
        """Return what a stored weight is off by."""
        weight = self.layer.weight
        error = weight - made.product(weight.dtype)
        tensor, dot = tensor_norm(error), dot_norm(error, self.layer.moments)
        whole, outputs = self.norms
        return LinearErrors(
            tensor / whole if whole else 0.0,
            dot / outputs if outputs else 0.0,
            made.bits() / self.layer.weight.numel(),
        )

    def _split(self, factors: Factors, log_d: torch.Tensor, rounder: Rounder) -> Made:
        kind = self.layer.weight.dtype
        left, right = factors.to(kind).split(normalised(log_d).to(kind))
        return Made(rounder.pair(left, right, self.layer.moments, self.layer.name))

    def _bits(self, one: Setting) -> int:
        assert one.bits is not None
        return one.bits

    def _rounder(self, bits: int) -> Rounder:
        return Rounder(self.options.quantizer, WeightScheme(bits=bits))

    def _rounded(self, bits: int) -> Stored:
        if bits not in self._whole:
            self._whole[bits] = self._rounder(bits)(self.layer.weight, self.layer.moments, self.layer.name)
        return self._whole[bits]

    def _of_weight(self, bits: int | None, one: Setting) -> Factors:
        """Return the factors of the weight (None) or of what rounding leaves of it, at the rank of a setting."""
        assert one.ratio is not None
        if bits not in self._factors:
            weight = self.layer.weight if bits is None else values(self._rounded(bits))
            moments = self.layer.moments if self.options.metric == "whiten" else None
            self._factors[bits] = factorise(
                weight,
                max(self.ranks.values()),
                moments=moments,
                damp=self.options.damp,
                name=self.layer.name,
            )
        return self._factors[bits].first(self.ranks[one.ratio])


def summed(parts: Sequence[Mapping[str, LinearErrors]], level: str) -> dict[str, float]:
    """Return the sums of errors at a level (``tensor`` or ``dot``), by linear."""
    return {name: sum(getattr(part[name], level) for part in parts) for name in parts[0]}
