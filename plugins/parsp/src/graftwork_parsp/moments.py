"""What a task leaves for later ones: second moments of the MLPs' inputs, equation (3), in one pass over its items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from graftwork import UserError
from graftwork.distributed import rank_and_world, sum_over_ranks
from graftwork.train.statistics import attended, second_moments
from graftwork_kernels.second_moments import add_second_moments_
from torch import nn

from graftwork_parsp.neurons import Mlp, base_of
from graftwork_parsp.nullspace import Sketch

Batch = Mapping[str, torch.Tensor]


@dataclass
class Collected:
    """Means over a task's tokens, by MLP: (1/n) sum of x x^T whole or as a sketch, and of a a^T as a sketch."""

    full: dict[str, torch.Tensor] = field(default_factory=dict)
    sketch: dict[str, Sketch] = field(default_factory=dict)
    columns: dict[str, Sketch] = field(default_factory=dict)


def collect(
    model: nn.Module,
    mlps: Sequence[Mlp],
    batches: Iterable[Batch],
    *,
    moments: Literal["full", "sketch"] = "full",
    columns: bool = False,
    size: int = 512,
) -> Collected:
    """Return the moments of the inputs of ``mlps``, and with ``columns`` of their activations, over all processes.

    Padding does not count. ``size`` is the number of rows of a sketch.

    Raises:
        UserError: a moment is not finite, or an MLP's input projections read different tensors.
    """
    base = base_of(model)
    pass_ = _Pass(base)
    handles: list[Any] = []
    fed: list[nn.Module] = []
    inputs = {mlp.name: Sketch.empty(size, mlp.inputs) for mlp in mlps} if moments == "sketch" else {}
    actives = {mlp.name: Sketch.empty(size, mlp.neurons) for mlp in mlps} if columns else {}
    for mlp in mlps:
        handles += pass_.same_input(base, mlp)
        for sketches, key in ((inputs, mlp.moment_at), (actives, mlp.out)):
            if mlp.name in sketches:
                module = base.get_submodule(key)
                handles.append(module.register_forward_pre_hook(pass_.feed(sketches[mlp.name], mlp.name)))
                fed.append(module)
    modules = {m.name: base.get_submodule(m.moment_at) for m in mlps} if moments == "full" else {}
    try:
        found = second_moments(model, modules, pass_.watch(batches), also=fed, add=add_second_moments_)
    finally:
        for handle in handles:
            handle.remove()
    device = next(model.parameters()).device
    return Collected(
        full={name: moment.mean.cpu() for name, moment in found.items()},
        sketch={name: _over_ranks(s, pass_.tokens[id(s)], device) for name, s in inputs.items()},
        columns={name: _over_ranks(s, pass_.tokens[id(s)], device) for name, s in actives.items()},
    )


class _Pass:
    """The batch at hand, for hooks that must know which of its tokens are padding."""

    def __init__(self, base: nn.Module) -> None:
        self.batch: Batch = {}
        self.tokens: dict[int, int] = {}
        config: Any = getattr(base, "config", None)
        decoder = getattr(config, "is_encoder_decoder", False)
        self.encoder = set(base.get_encoder().modules()) if decoder else None

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.batch = batch
            yield batch

    def feed(self, sketch: Sketch, name: str) -> Any:
        self.tokens[id(sketch)] = 0

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            of_answer = self.encoder is not None and module not in self.encoder
            mask = self.batch["labels"] != -100 if of_answer else attended(self.batch)
            x = args[0].detach().flatten(0, -2)[mask.flatten()].float()
            if not torch.isfinite(x).all():
                raise UserError(
                    f"the inputs of layer '{name}' are not finite numbers on this task's data; lower "
                    f"'learning_rate', or load the model with dtype float32"
                )
            sketch.add(x)
            self.tokens[id(sketch)] += len(x)

        return hook

    def same_input(self, base: nn.Module, mlp: Mlp) -> list[Any]:
        seen: list[int] = [0]

        def first(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[0] = args[0].data_ptr()

        def other(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args[0].data_ptr() != seen[0]:
                raise UserError(
                    f"PaRSP: the input projections of '{mlp.name}' read different tensors, so they share no null "
                    f"space; name others in plugins.parsp.neurons"
                )

        hooks = [first, *([other] * (len(mlp.ins) - 1))]
        return [
            base.get_submodule(key).register_forward_pre_hook(hook)
            for key, hook in zip(mlp.ins, hooks, strict=True)
        ]


def _over_ranks(sketch: Sketch, tokens: int, device: torch.device) -> Sketch:
    """Return the sketch of all processes' tokens together, divided by their number, on the CPU."""
    rank, world = rank_and_world()
    count = int(sum_over_ranks(torch.tensor(tokens, device=device)))
    if world > 1:
        # Sketches do not add up; every process lays its own into its place and merges all in the same order.
        shape = (world, *sketch.rows.shape)
        rows = torch.zeros(shape, device=device)
        energy = torch.zeros(world, len(sketch.energy), device=device)
        rows[rank], energy[rank] = sketch.rows.to(device), sketch.energy.to(device)
        rows, energy = sum_over_ranks(rows).cpu(), sum_over_ranks(energy).cpu()
        sketch = Sketch.empty(*sketch.rows.shape)
        for own, part in zip(rows, energy, strict=True):
            sketch.merge(Sketch(own, part))
    sketch = Sketch(sketch.rows.cpu(), sketch.energy.cpu())
    return sketch.scaled(1 / max(count, 1))
