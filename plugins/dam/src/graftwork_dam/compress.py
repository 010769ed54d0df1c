"""One decoder layer: factorise its linears, choose their diagonals, round, and put the factors in their places."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from graftwork import UserError
from graftwork.errors import did_you_mean
from graftwork.transform.block import Block
from graftwork.transform.modules import CompressedLinear, Factored
from graftwork.transform.quantizer import Quantized
from graftwork.transform.scheme import check_group
from graftwork_kernels import announce
from torch import nn

from graftwork_dam import fold
from graftwork_dam.block_loss import learn_together
from graftwork_dam.choose import Choice, Problem, choose, scaled_moments
from graftwork_dam.errors import gaps
from graftwork_dam.factor import Factors, choose_rank, factorise
from graftwork_dam.forward import Rounding
from graftwork_dam.inputs import choose_inputs
from graftwork_dam.layer import Layer, measure
from graftwork_dam.options import DamOptions
from graftwork_dam.rounder import Rounder, values

FIGURES = {
    "low_rank": "rank of a linear",
    "dam_error": "squared error of a linear's outputs relative to their square, with its factors as stored",
    "dam_start_error": "the same at the best start, before the diagonal was learned",
    "tensor_gap": "error on the weight beyond those of low rank alone and rounding alone, relative",
    "dot_gap": "the same of the outputs",
    "block_error": "loss: block, squared error of the decoder layer's output, relative",
    "block_start_error": "the same before the diagonals were learned",
    "log_d_range": "largest over smallest entry of the diagonal, as a logarithm",
}


def compress_block(block: Block, options: DamOptions) -> None:
    """Compress the linears of a decoder layer as ``options`` say.

    Raises:
        UserError: a pattern that fits nothing, linears that are factored or rounded already, a rank that does not fit.
    """
    if options.kv.rounds:
        # First, so that what the later linears read is what they will read.
        block.set_kv(options.kv)
    modules = targets(block, options.targets)
    if not modules:
        return
    announce(block.console.say, next(block.module.parameters()).device)
    Compression(block, modules, options).run()


class Compression:
    """The state of one decoder layer while it is compressed."""

    def __init__(self, block: Block, modules: Mapping[str, Any], options: DamOptions) -> None:
        self.block, self.options, self.modules = block, options, dict(modules)
        self.rounding: Rounding = options.rounding
        self.rounder = Rounder(options.quantizer, self.rounding.weights, options.feedback_damp)
        # Rounds a weight as one matrix, whatever becomes of the factors.
        self.whole = Rounder(options.quantizer, options.weights, options.feedback_damp)

    def run(self) -> None:
        options, block = self.options, self.block
        layers = measure(block, self.modules, options.learn.tokens)
        self._warn(layers)
        if options.order == "q_of_l":
            for name, layer in layers.items():
                self._store_whole(name, layer)
            return
        problems = {name: self._problem(layer) for name, layer in layers.items()}
        if options.loss == "block":
            self._together(problems)
        elif options.place == "rank":
            for name, problem in problems.items():
                self._store(name, problem, self._choose(problem))
        else:
            self._with_inputs(problems)

    # ------------------------------------------------------------ what is chosen

    def _problem(self, layer: Layer) -> Problem:
        return Problem(layer, self._factors(layer), self.rounding)

    def _factors(self, layer: Layer) -> Factors:
        options = self.options
        weight = layer.weight
        if options.order in ("ql", "qlq"):
            weight = values(self.whole(weight, layer.moments, layer.name))
        moments = layer.moments if options.metric == "whiten" else None
        name = f"{self.block.name}.{layer.name}"
        return factorise(weight, self._rank(layer), moments=moments, damp=options.damp, name=name)

    def _rank(self, layer: Layer) -> int:
        options = self.options
        rows, columns = layer.weight.shape
        group = options.group if self.rounder.scheme.rounds else None
        name = f"{self.block.name}.{layer.name}"
        rank = choose_rank(rows, columns, ratio=options.ratio, rank=options.rank, group=group, name=name)
        check_group(self.rounder.scheme, columns, name)
        check_group(self.rounder.scheme, rank, f"{name}.1")
        return rank

    def _choose(self, problem: Problem, steps: int | None = None) -> Choice:
        options = self.options
        # Where nothing is rounded the diagonal cancels.
        rounds = self.rounding.weights.rounds or self.rounding.of_tokens
        steps = options.learn.steps if steps is None else steps
        return choose(problem, options.init, self.rounder, steps=steps if rounds else 0, lr=options.learn.lr)

    def _together(self, problems: Mapping[str, Problem]) -> None:
        """Learn all diagonals of the decoder layer by its own output."""
        options = self.options
        starts = {name: self._choose(problem, steps=0) for name, problem in problems.items()}

        def stored(choices: Mapping[str, torch.Tensor]) -> nn.Module:
            module = copy.deepcopy(self.block.module)
            for name, log_d in choices.items():
                parent, _, last = name.rpartition(".")
                factored = self._factored(name, problems[name], log_d, rounder=self.rounder.judge)
                setattr(module.get_submodule(parent), last, factored)
            return module

        found = learn_together(
            self.block, problems, {n: c.log_d for n, c in starts.items()}, options.learn, stored
        )
        for name, problem in problems.items():
            start = starts[name]
            if found.better:
                loss = problem.stored_loss(found.logs[name], self.rounder.judge)
                start = Choice(found.logs[name], "learned", loss, start.start, found.finite)
            self._store(name, problem, start)
        self.block.record("", block_error=found.loss, block_start_error=found.start)

    def _with_inputs(self, problems: Mapping[str, Problem]) -> None:
        """Choose diagonals on the inputs of every place, fold them into what stands before, and store the factors."""
        options, block = self.options, self.block
        both = options.place == "both"
        choices = {
            name: self._choose(problem, steps=0).log_d if both else problem.textbook()
            for name, problem in problems.items()
        }
        log_e: dict[str, torch.Tensor] = {}
        row_scale: dict[str, torch.Tensor] = {}
        found: dict[str, Choice] = {}
        for place in block.places():
            members = [name for name in place.linears if name in problems]
            if not members:
                continue
            turned = next((n for n in place.linears if getattr(self.modules.get(n), "rotation", None)), None)
            if turned is not None:
                raise UserError(
                    f"'{block.name}.{turned}' rotates its inputs, which a diagonal on them cannot pass; use place: rank"
                )
            chosen = choose_inputs(
                place,
                [problems[name] for name in members],
                [choices[name] for name in members],
                "grid" if both else options.init,
                self.rounder,
                steps=options.learn.steps,
                lr=options.learn.lr,
                both=both,
            )
            for name, log_d in zip(members, chosen.logs, strict=True):
                log_e[name] = chosen.log_e
                share = len(members)
                found[name] = Choice(
                    log_d, chosen.name, chosen.loss / share, chosen.start / share, chosen.finite
                )
            for name in place.linears:
                if name not in members:
                    fold.scale_columns(block.get(name), chosen.log_e.exp())
            factor = (-chosen.source).exp()
            if place.source in problems:
                row_scale[place.source] = factor
            elif place.kind == "norm":
                fold.scale_norm(block.get(place.source), factor)
            else:
                fold.scale_rows(block.get(place.source), factor)
        for name, problem in problems.items():
            self._store(name, problem, found[name], log_e.get(name), row_scale.get(name))

    # ------------------------------------------------------------ what is stored

    def _factored(
        self,
        name: str,
        problem: Problem,
        log_d: torch.Tensor,
        log_e: torch.Tensor | None = None,
        row_scale: torch.Tensor | None = None,
        rounder: Rounder | None = None,
    ) -> Factored:
        rounder = rounder or self.rounder
        module = self.modules[name]
        left, right = problem.factors.split(log_d.to(problem.factors.left))
        moments, bias = problem.layer.moments, module.bias
        if log_e is not None:
            right, moments = right * log_e.exp(), scaled_moments(moments, log_e)
        if row_scale is not None:
            left = left * row_scale[:, None]
            bias = None if bias is None else (bias * row_scale).to(bias)
        kind = module.weight.dtype
        stored_left, stored_right = rounder.pair(left.to(kind), right.to(kind), moments, name)
        acts = rounder.quantizer != "none"
        return Factored(
            CompressedLinear(
                stored_right,
                rotation=getattr(module, "rotation", None),
                activations=self.rounding.inputs if acts else None,
            ),
            CompressedLinear(stored_left, bias, activations=self.rounding.latents if acts else None),
        )

    def _store(
        self,
        name: str,
        problem: Problem,
        choice: Choice,
        log_e: torch.Tensor | None = None,
        row_scale: torch.Tensor | None = None,
    ) -> None:
        """Put the factors of a linear in its place and record what they are like."""
        factored = self._factored(name, problem, choice.log_d, log_e, row_scale)
        product = factored.second.dense_weight().double() @ factored.first.dense_weight().double()
        if self.options.format == "merged":
            self._merge(name, product)
        else:
            self.block.replace(name, factored)
        if log_e is not None:
            product = product * (-log_e.double()).exp()
        if row_scale is not None:
            product = product / row_scale.double()[:, None]
        spread = choice.log_d.max() - choice.log_d.min()
        self.block.record(
            name,
            low_rank=float(problem.factors.rank),
            start=choice.name,
            dam_error=choice.loss,
            dam_start_error=choice.start,
            log_d_range=float(spread),
        )
        if not choice.finite:
            self.block.record(name, learning="ended at a value that is no number; the best before it is kept")
        self._record_gaps(problem.layer, problem.factors, product)

    def _merge(self, name: str, product: torch.Tensor) -> None:
        """Put one dense matrix where the linear was."""
        module = self.modules[name]
        # A new tensor: the old one is still compared with.
        module.weight = nn.Parameter(product.to(module.weight), requires_grad=False)
        if self.rounding.inputs.rounds and self.options.quantizer != "none":
            self.block.compressed(name).activations = self.rounding.inputs

    def _store_whole(self, name: str, layer: Layer) -> None:
        """Store the low-rank weight rounded as one matrix (``order: q_of_l``)."""
        factors = self._factors(layer)
        kind = self.modules[name].weight.dtype
        stored = self.whole(factors.product().to(kind), layer.moments, name)
        rounded = values(stored)
        if isinstance(stored, Quantized):
            self.block.round(name, stored, self.options.activations)
        else:
            self._merge(name, rounded)
        self.block.record(name, low_rank=float(factors.rank))
        self._record_gaps(layer, factors, rounded.double())

    def _record_gaps(self, layer: Layer, factors: Factors, joint: torch.Tensor) -> None:
        """Record by how much the error is more than those of low rank and of rounding, each alone."""
        if not self.whole.rounds:
            return
        options, name = self.options, layer.name
        if options.order in ("ql", "qlq"):
            # Their factors are those of the rounded weight.
            moments = layer.moments if options.metric == "whiten" else None
            factors = factorise(layer.weight, factors.rank, moments=moments, damp=options.damp, name=name)
        low = factors.product()
        rounded = values(self.whole(layer.weight, layer.moments, name))
        found = gaps(layer.weight, joint, low, rounded, layer.moments)
        if math.isfinite(found.tensor) and found.dot is not None:
            self.block.record(name, tensor_gap=found.tensor, dot_gap=found.dot)

    def _warn(self, layers: Mapping[str, Layer]) -> None:
        options = self.options
        if self.block.index or options.metric != "whiten":
            return
        for name, layer in layers.items():
            rank = self._rank(layer)
            if layer.tokens < rank:
                self.block.note(
                    f"{layer.tokens} calibration tokens are fewer than the rank {rank} of '{name}': directions that "
                    f"they do not show are kept as in an arbitrary basis; calibrate on more text"
                )
                return


def targets(block: Block, patterns: list[str]) -> dict[str, Any]:
    """Return the linears of a decoder layer that ``patterns`` (all where empty) fit, by their names within it.

    Raises:
        UserError: a pattern that fits no linear of any layer; a linear that is factored, corrected or rounded already.
    """
    every = block.linears()
    prefix = block.name.rpartition(".")[0]
    if not block.index:
        known = [f"{prefix}.{index}.{name}" for index in range(block.count) for name in _all_linears(block)]
        for pattern in patterns:
            if not any(_fits(pattern, full, prefix) for full in known):
                raise UserError(
                    f"plugins.dam.targets: '{pattern}' fits no linear{did_you_mean(pattern, [*every])}; those of a "
                    f"layer are {', '.join(every)}"
                )
    found = {
        name: module
        for name, module in _all_linears(block).items()
        if not patterns or any(_fits(pattern, f"{block.name}.{name}", prefix) for pattern in patterns)
    }
    for name in found:
        parent = name.rpartition(".")[0]
        full = f"{block.name}.{name}"
        if isinstance(block.get(parent) if parent else block.module, Factored):
            raise UserError(f"'{block.name}.{parent}' is factored already; a weight is factored once")
        if name not in every:
            raise UserError(
                f"'{full}' is rounded already, and low rank comes first: name dam before the plugin that rounds"
            )
        if getattr(every[name], "correction", None) is not None:
            raise UserError(f"'{full}' has a low-rank correction, which dam would lose; use one of both")
    return {name: every[name] for name in found}


def _all_linears(block: Block) -> dict[str, Any]:
    kinds = nn.Linear | CompressedLinear
    return {name: module for name, module in block.module.named_modules() if isinstance(module, kinds)}


def _fits(pattern: str, full: str, prefix: str) -> bool:
    """Whether a pattern fits a linear by its full name, or by its name within the layer."""
    within = full.removeprefix(f"{prefix}.").partition(".")[2]
    return fnmatchcase(full, pattern) or fnmatchcase(within, pattern)
