"""EWC: a quadratic pull towards the parameters of past tasks, weighed by how much those tasks depend on them.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017 (one penalty per past
task); the online form is that of Schwarz et al., "Progress & Compress", ICML 2018.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from graftwork import LossTerm, UserError, hookimpl
from graftwork.train.statistics import task_batches
from pydantic import BaseModel, ConfigDict, Field

from graftwork_cl_baselines.checks import refuse_field
from graftwork_cl_baselines.quadratic import Quadratic, fisher, trained_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from graftwork import Adapter
    from graftwork.data.tasks import Task
    from graftwork.run import Run
    from transformers import Trainer


class EwcOptions(BaseModel):
    """Options of EWC."""

    model_config = ConfigDict(extra="forbid")

    strength: float = Field(
        400, ge=0, description="weight of the penalty (lambda); the formula has a 1/2 besides"
    )
    mode: Literal["separate", "online"] = Field(
        "separate", description="separate: one penalty per past task; online: one, its importance decaying"
    )
    gamma: float = Field(
        1.0, ge=0, le=1, description="online: what a task leaves of the importance so far (1: all of it)"
    )
    fisher_items: int | None = Field(
        None,
        ge=1,
        description="items of a task that its importance is estimated from, the first ones; all if not set",
    )


class Ewc:
    """``L + strength/2 * sum_t sum_i F_ti (theta_i - theta*_ti)^2`` over everything that trains."""

    Options = EwcOptions
    neutral: ClassVar[dict[str, Any]] = {"strength": 0.0}
    sharding = frozenset({"zero2"})

    def __init__(self, options: EwcOptions) -> None:
        self.options = options
        self.past = Quadratic()

    @hookimpl
    def check(self, run: Run) -> None:
        refuse_field("ewc", run, "packing", "importance is taken per item, and packing joins items")

    @hookimpl
    def check_adapter(self, run: Run, adapter: Adapter | None) -> None:
        if adapter is None or adapter.policy == "shared":
            return
        makers = run.plugins.implements("adapter_config")
        who = (
            f"plugins 'ewc' and '{makers[0]}' cannot be combined" if makers else "plugin 'ewc' cannot be used"
        )
        raise UserError(
            f"{who}: it pulls on parameters that are trained from task to task (hook loss_terms), and the adapter's "
            f"policy '{adapter.policy}' freezes those of earlier tasks; set adapter.policy: shared, or leave one of "
            f"them out"
        )

    @hookimpl
    def loss_terms(self, run: Run, model: torch.nn.Module) -> Sequence[LossTerm]:
        if not self.past or not self.options.strength:
            return []
        parameters = trained_parameters(model)
        if not self.past.weights.keys() & parameters.keys():
            raise UserError(
                "plugin 'ewc' finds none of the parameters of earlier tasks among those that train now; it needs "
                "an adapter of the policy 'shared', or full weights"
            )
        # Read at every step: a resumed run gets the past back after this.
        return [LossTerm("ewc", lambda *_: self.past.penalty(parameters), self.options.strength, per="step")]

    @hookimpl
    def task_end(self, run: Run, task: Task, trainer: Trainer) -> None:
        batches = task_batches(
            trainer, items=self.options.fisher_items, batch_size=1, console=run.console, label="importance"
        )
        importance = fisher(trainer.model, batches)
        parameters = trained_parameters(trainer.model)
        if self.options.mode == "separate":
            self.past.add(importance, parameters)
        else:
            self.past.replace(importance, parameters, self.options.gamma)

    @hookimpl
    def save_state(self, run: Run) -> Mapping[str, torch.Tensor]:
        return self.past.state()

    @hookimpl
    def load_state(self, run: Run, state: Mapping[str, torch.Tensor]) -> None:
        self.past = Quadratic.from_state(state)
