"""InfLoRA: one LoRA per task whose input directions are chosen before the task, outside those of older tasks.

Liang and Li, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning", CVPR 2024, and its
official code. Only B trains; A is frozen in directions that old inputs (almost) do not have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from graftwork import Adapter, AreaChart, UserError, hookimpl
from graftwork.evaluate.modes import evaluating
from graftwork.train.statistics import Moment, second_moments, task_batches
from pydantic import Field

from graftwork_cl_baselines.stacked import StackedOptions, adapted_layers, training_layers
from graftwork_cl_baselines.subspace import Subspace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from graftwork.data.tasks import Task
    from graftwork.run import Run
    from transformers import PreTrainedModel, Trainer


class InfLoraOptions(StackedOptions):
    """Options of InfLoRA."""

    eps: float = Field(
        0.995,
        gt=0,
        le=1,
        description="share of a task's inputs (squared second moment) that later tasks keep clear of; rises to 1",
    )
    init: Literal["data", "random"] = Field(
        "data", description="A from the new task's free input directions, or random ones made free of the old"
    )
    moment_items: int | None = Field(
        None, ge=1, description="items of a task that its input directions are taken from; all if not set"
    )


class InfLora:
    """A fresh LoRA per task; A frozen in the null space of old inputs, B trained; all summed at inference."""

    Options = InfLoraOptions
    # Of a few short items, more directions than these are told apart by rounding.
    tiny: ClassVar[dict[str, Any]] = {"rank": 2, "eps": 0.6}
    sharding = frozenset({"zero2", "zero3", "fsdp2"})

    def __init__(self, options: InfLoraOptions) -> None:
        self.options = options
        # By the first of the layers that share an input.
        self.spaces: dict[str, Subspace] = {}
        self.groups: dict[str, list[str]] = {}
        self.taken: dict[str, torch.Tensor] = {}

    @hookimpl
    def adapter_config(self, run: Run, model: PreTrainedModel) -> Adapter:
        adapter = self.options.adapter()
        for name, layer in adapted_layers(adapter, model).items():
            if self.options.rank > layer.in_features:
                raise UserError(
                    f"plugin 'inf-lora': rank {self.options.rank} is more than the {layer.in_features} input "
                    f"directions of layer '{name}'; lower plugins.inf-lora.rank"
                )
        return adapter

    @hookimpl
    def task_begin(self, run: Run, task: Task, trainer: Trainer) -> None:
        layers = {name: (layer, new) for name, layer, new in training_layers(trainer.model)}
        self.groups = shared_inputs(trainer)
        moments = self._moments(run, trainer, "inputs before") if self.options.init == "data" else {}
        for first, members in self.groups.items():
            space = self._space(first, layers[first][0])
            self._refuse_full(first, space)
            for name in members:
                layer, new = layers[name]
                weight = layer.lora_A[new].weight
                with torch.no_grad():
                    chosen = (
                        space.inputs(moments[first].matrix, self.options.rank)
                        if moments
                        else space.project_out(weight)
                    )
                    weight.copy_(chosen)
                weight.requires_grad_(False)

    @hookimpl
    def task_end(self, run: Run, task: Task, trainer: Trainer) -> None:
        layers = {name: layer for name, layer, _ in training_layers(trainer.model)}
        eps = self.options.eps
        threshold = eps + (1 - eps) * task.index / task.total
        added = []
        for first, moment in self._moments(run, trainer, "inputs after").items():
            space = self._space(first, layers[first])
            self.spaces[first] = space.extended(moment.matrix, threshold)
            added.append(self.spaces[first].size - space.size)
        self.taken[task.name] = torch.tensor(added)

    @hookimpl
    def save_state(self, run: Run) -> Mapping[str, torch.Tensor]:
        # Numbered, since a file of tensors does not keep their order.
        state = {}
        for number, (name, space) in enumerate(self.spaces.items()):
            state[f"{'free' if space.complement else 'used'}.{number}.{name}"] = space.basis
        for number, (name, added) in enumerate(self.taken.items()):
            state[f"taken.{number}.{name}"] = added
        return state

    @hookimpl
    def load_state(self, run: Run, state: Mapping[str, torch.Tensor]) -> None:
        self.spaces, self.taken = {}, {}
        for key in sorted(state, key=lambda key: int(key.split(".")[1])):
            part, _, name = key.split(".", 2)
            if part == "taken":
                self.taken[name] = state[key]
            else:
                self.spaces[name] = Subspace(state[key], complement=part == "free")

    @hookimpl
    def charts(self, run: Run) -> Sequence[AreaChart]:
        widths = torch.tensor([len(space.basis) for space in self.spaces.values()])
        return [
            AreaChart(
                "Input directions in use",
                "The share of every layer's input directions that a task's inputs need and later tasks keep clear "
                "of. Layers that share an input are shown once.",
                list(self.spaces),
                {task: (added / widths).tolist() for task, added in self.taken.items()},
            )
        ]

    def _moments(self, run: Run, trainer: Trainer, label: str) -> dict[str, Moment]:
        modules = dict(trainer.model.named_modules())
        batches = task_batches(trainer, items=self.options.moment_items, console=run.console, label=label)
        return second_moments(trainer.model, {name: modules[name] for name in self.groups}, batches)

    def _space(self, name: str, layer: torch.nn.Module) -> Subspace:
        device = next(layer.parameters()).device
        if name not in self.spaces:
            return Subspace.empty(layer.in_features, device)
        space = self.spaces[name]
        return Subspace(space.basis.to(device), space.complement)

    def _refuse_full(self, name: str, space: Subspace) -> None:
        if space.room < self.options.rank:
            raise UserError(
                f"plugin 'inf-lora': earlier tasks use {space.size} of the {len(space.basis)} input directions of "
                f"layer '{name}', which leaves too few for rank {self.options.rank}; lower plugins.inf-lora.eps or "
                f"plugins.inf-lora.rank"
            )


def shared_inputs(trainer: Trainer) -> dict[str, list[str]]:
    """Return the LoRA layers by the first of those that get the same input tensor, found with one item."""
    model = trainer.model
    seen: list[tuple[torch.Tensor, str]] = []
    groups: dict[str, list[str]] = {}
    names = {layer: name for name, layer, _ in training_layers(model)}

    def see(layer: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        name = names[layer]
        first = next((other for tensor, other in seen if tensor is args[0]), None)
        if first is None:
            seen.append((args[0], name))
        groups.setdefault(first or name, []).append(name)

    handles = [layer.register_forward_pre_hook(see) for layer in names]
    batches = task_batches(trainer, batch_size=1)
    try:
        with evaluating(model):
            batch = next(batches)
            # An encoder-decoder makes its decoder's inputs of the labels.
            keys = ("input_ids", "attention_mask", "position_ids", "labels")
            inputs = {key: batch[key] for key in keys if key in batch}
            model(**inputs, use_cache=False)
    finally:
        batches.close()
        for handle in handles:
            handle.remove()
    reached = {name for members in groups.values() for name in members}
    return {**groups, **{name: [name] for name in names.values() if name not in reached}}
