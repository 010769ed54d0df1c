"""LwF: on the new items, keep predicting what the model predicted before the task.

Li and Hoiem, "Learning without Forgetting", ECCV 2016, with one head for all tasks: the old model's
distribution over the vocabulary at every answer token of the new items is the target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from graftwork import LossTerm, UserError, hookimpl
from pydantic import BaseModel, ConfigDict, Field

from graftwork_cl_baselines.distil import Watch, distance, scaled_logits
from graftwork_cl_baselines.quadratic import trained_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from graftwork.data.tasks import Task
    from graftwork.run import Run
    from transformers import PreTrainedModel, Trainer


class LwfOptions(BaseModel):
    """Options of LwF."""

    model_config = ConfigDict(extra="forbid")

    strength: float = Field(1.0, ge=0, description="weight of the distillation (lambda)")
    temperature: float = Field(2.0, gt=0, description="temperature of both distributions")
    first_task: bool = Field(
        False,
        description="distil the untouched model in the first task as well; it has no earlier task to keep",
    )


class Lwf:
    """``L + strength * T^2 KL(softmax(z_old/T) || softmax(z_new/T))``, z_old from the model before the task."""

    Options = LwfOptions
    neutral: ClassVar[dict[str, Any]] = {"strength": 0.0}
    sharding = frozenset({"zero2"})

    def __init__(self, options: LwfOptions) -> None:
        self.options = options
        self.before: dict[str, torch.Tensor] = {}
        self.watch: Watch | None = None
        self.first = True

    @hookimpl
    def check(self, run: Run) -> None:
        if run.job.algorithm in ("dpo", "grpo"):
            raise UserError(
                f"plugin 'lwf' distils labelled answers, which algorithm '{run.job.algorithm}' does not have; "
                f"set algorithm: sft"
            )
        players = run.plugins.implements("self_play")
        if players:
            raise UserError(
                f"plugins 'lwf' and '{players[0]}' cannot be combined: the one distils labelled answers (hook "
                f"loss_terms), and the other learns from pairs without labels (hook self_play); leave one of them out"
            )

    @hookimpl
    def adapter_config(self, run: Run, model: PreTrainedModel) -> None:
        field = scaled_logits(model.config)
        if field is not None:
            raise UserError(
                f"plugin 'lwf' needs logits that are the output embedding's own, and model '{run.job.model.ref}' "
                f"changes them ('{field}' in its config); choose another model or leave the plugin out"
            )

    @hookimpl
    def task_begin(self, run: Run, task: Task, trainer: Trainer) -> None:
        self.first = task.index == 0

    @hookimpl
    def loss_terms(self, run: Run, model: torch.nn.Module) -> Sequence[LossTerm]:
        if not self.options.strength or (self.first and not self.options.first_task):
            return []
        # What does not train is the same before and after, so this and the model are the old model.
        self.before = {name: value.detach().clone() for name, value in trained_parameters(model).items()}
        self.watch = Watch(model)
        return [LossTerm("lwf", self.term, self.options.strength)]

    def term(self, model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the distillation loss of one batch, whose forward pass was just done."""
        assert self.watch is not None
        if batch.get("labels") is None:
            raise UserError(
                "plugin 'lwf': the trainer's batches have no 'labels'; train with algorithm: sft or seq2seq"
            )
        new = self.watch.new_logits(batch["labels"])
        return distance(self.watch.old_logits(batch, self.before), new, self.options.temperature)

    @hookimpl
    def task_end(self, run: Run, task: Task, trainer: Trainer) -> None:
        if self.watch is not None:
            self.watch.close()
        self.watch, self.before = None, {}

    @hookimpl
    def save_state(self, run: Run) -> Mapping[str, torch.Tensor]:
        return self.before

    @hookimpl
    def load_state(self, run: Run, state: Mapping[str, torch.Tensor]) -> None:
        self.before = {
            name: value.to(self.before[name].device) if name in self.before else value
            for name, value in state.items()
        }
