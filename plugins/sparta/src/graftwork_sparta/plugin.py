"""The hooks of SpaRTA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from graftwork import GradientTransform, LossTerm, UserError, hookimpl
from graftwork_kernels import announce
from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from graftwork_sparta.config import SpartaConfig
from graftwork_sparta.losses import branch_overlap, component_overlap
from graftwork_sparta.model import freeze_new, gate_values, grow, prompt_context
from graftwork_sparta.restore import Restoration

if TYPE_CHECKING:
    from graftwork.data.tasks import Task
    from graftwork.run import Run
    from transformers import PretrainedConfig, PreTrainedModel, Trainer


class SpartaOptions(BaseModel):
    """Options of SpaRTA."""

    model_config = ConfigDict(extra="forbid")

    rank_shared: int = Field(
        2, ge=0, description="rank of the shared branch; below rank_specific; 0 leaves it out"
    )
    rank_specific: int = Field(8, ge=1, description="rank of the specific branch")
    scale: float = Field(1.0, gt=0, description="constant factor of both branches")
    init: Literal["lora", "lineage"] = Field("lora", description="Kaiming A, or normal with std 1/rank^2")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the branches' input")
    target_modules: str | list[str] = Field("all-linear", description="layers to adapt, as in PEFT")
    router: Literal["prompt", "lineage", "off"] = Field(
        "prompt", description="form of the router; off: both gates 1"
    )
    lineage_pool: Literal["all", "prompt"] = Field(
        "all", description="lineage router: sum over all positions, answers included, or the prompt only"
    )
    block_layers: int = Field(4, ge=1, description="decoder layers that share a gate")
    components: int = Field(8, ge=1, description="router components added by each task")
    lambda_orth: float = Field(1.0, ge=0, description="weight of the overlap between the branches")
    mu: float = Field(1.0, ge=0, description="weight of the router components' orthonormality")
    orth: Literal["input", "output", "both"] = Field(
        "input", description="overlap of rows of A, columns of B, or both"
    )
    orth_mode: Literal["penalty", "project"] = Field(
        "penalty", description="penalty: a loss term; project: exact, in the forward pass"
    )
    specific: Literal["single", "per_task"] = Field(
        "single", description="one specific branch, or a fresh one per task with the older ones frozen"
    )
    shared_lr: float = Field(1.0, gt=0, description="learning-rate factor of the shared branch")
    prompt_fallback: Literal["half", "refuse"] = Field(
        "half", description="texts without a prompt: gate by their first half, or refuse"
    )
    restore_every: int = Field(0, ge=0, description="steps between stochastic restorations; 0: never")
    restore_probability: float = Field(1e-5, ge=0, le=1, description="chance of an entry to be restored")

    @model_validator(mode="after")
    def _ranks(self) -> SpartaOptions:
        if self.rank_specific <= self.rank_shared:
            raise ValueError(
                f"rank_specific = {self.rank_specific} must be larger than rank_shared = {self.rank_shared}"
            )
        return self


class Sparta:
    """A shared low-rank and a specific high-rank branch per layer, kept orthogonal, weighed by a prompt router."""

    Options = SpartaOptions
    tiny: ClassVar[dict[str, Any]] = {"block_layers": 1, "rank_specific": 4, "components": 2}
    sharding = frozenset({"zero2"})

    def __init__(self, options: SpartaOptions) -> None:
        self.options = options
        self.restoration: Restoration | None = None
        self.trained: torch.nn.Module | None = None
        self.kept_gates: torch.Tensor | None = None

    @hookimpl
    def check(self, run: Run) -> None:
        train = run.job.train
        if self.options.router != "off":
            for field in ("packing", "padding_free"):
                if train.get(field):
                    raise UserError(
                        f"plugin 'sparta': a gate belongs to a row of the batch, which train.{field} takes apart; "
                        f"remove it or set plugins.sparta.router: off"
                    )
            checkpointing = train.get("gradient_checkpointing_kwargs") or {}
            if isinstance(checkpointing, dict) and checkpointing.get("use_reentrant"):
                raise UserError(
                    "plugin 'sparta': re-entrant gradient checkpointing loses the gates' gradient; "
                    "set train.gradient_checkpointing_kwargs.use_reentrant: false"
                )

    @hookimpl
    def adapter_config(self, run: Run, model: PreTrainedModel) -> SpartaConfig:
        if self.options.router != "off" and not _is_decoder(model.config):
            raise UserError(
                f"plugin 'sparta': the router reads the prompt of a decoder and '{model.config.model_type}' is "
                f"none; set plugins.sparta.router: off"
            )
        of_adapter = set(SpartaOptions.model_fields) & set(SpartaConfig.__dataclass_fields__)
        return SpartaConfig(task_type="CAUSAL_LM", **self.options.model_dump(include=of_adapter))

    @hookimpl
    def loss_terms(self, run: Run, model: torch.nn.Module) -> Sequence[LossTerm]:
        options, terms = self.options, []
        if options.lambda_orth and options.orth_mode == "penalty" and options.rank_shared:
            terms.append(
                LossTerm(
                    "orth",
                    lambda model, _: branch_overlap(model, options.orth),
                    options.lambda_orth,
                    per="step",
                )
            )
        if options.mu and options.router != "off":
            terms.append(
                LossTerm("components", lambda model, _: component_overlap(model), options.mu, per="step")
            )
        return terms

    @hookimpl
    def learning_rate_factors(self, run: Run, model: torch.nn.Module) -> Mapping[str, float] | None:
        if self.options.shared_lr == 1.0:
            return None
        return {
            name: self.options.shared_lr
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and ".sparta_shared_" in name
        }

    @hookimpl
    def batch_begin(self, run: Run, model: torch.nn.Module, batch: Mapping[str, Any]) -> None:
        # Preference and policy-gradient trainers mark the answer with masks and pass no labels to the model.
        context = prompt_context(model)
        if context is None or "completion_mask" not in batch:
            return
        answer = batch["completion_mask"]
        if "prompt_mask" in batch:
            context.give(torch.cat([batch["prompt_mask"].bool(), torch.zeros_like(answer).bool()], 1))
        elif "attention_mask" in batch:
            context.give((answer.cumsum(1) == 0) & batch["attention_mask"].bool())

    @hookimpl
    def task_begin(self, run: Run, task: Task, trainer: Trainer) -> None:
        announce(run.console.say, trainer.args.device)
        self.trained, self.kept_gates = cast(torch.nn.Module, trainer.model), None
        if task.index > 0:
            grow(trainer.model, torch.Generator().manual_seed(run.seed * 1009 + task.index))
        if self.options.restore_every:
            self.restoration = Restoration(
                self.options.restore_every, self.options.restore_probability, run.seed
            )
            self.restoration.begin(trainer.model)

    @hookimpl
    def transform_gradients(self, run: Run, model: torch.nn.Module) -> Sequence[GradientTransform]:
        if self.restoration is None:
            return []
        return [GradientTransform("restoration", after_step=self.restoration.after_step)]

    @hookimpl
    def task_end(self, run: Run, task: Task, trainer: Trainer) -> None:
        freeze_new(trainer.model)
        away = self._gates()
        if away is not None:
            # How far the gates of the last batch are from doing nothing, for whoever asks what the router does.
            mean, most = away.tolist()
            run.events.write("gates", task=task.name, mean_from_1=mean, most=most)

    @hookimpl
    def save_state(self, run: Run) -> Mapping[str, torch.Tensor] | None:
        state: dict[str, torch.Tensor] = {}
        if self.restoration is not None:
            state |= {**self.restoration.start, "step": torch.tensor(self.restoration.step)}
        away = self._gates()
        if away is not None:
            # A run that goes on behind its last step sees no batch any more.
            state["gates"] = away
        return state or None

    @hookimpl
    def load_state(self, run: Run, state: Mapping[str, torch.Tensor]) -> None:
        self.kept_gates = state.get("gates")
        if self.restoration is not None and "step" in state:
            start = {name: value for name, value in state.items() if name not in ("step", "gates")}
            self.restoration.start = start
            self.restoration.step = int(state["step"])

    def _gates(self) -> torch.Tensor | None:
        """Return mean and maximum of |gate - 1| over the last batch; None where there is no router, or was no batch."""
        if self.options.router == "off" or self.trained is None:
            return None
        try:
            away = (gate_values(self.trained) - 1).abs()
        except KeyError:
            return self.kept_gates
        return torch.stack([away.mean(), away.max()]).cpu()

    @hookimpl
    def generation_context(self, run: Run, model: PreTrainedModel) -> AbstractContextManager[None] | None:
        context = prompt_context(model)
        return None if context is None else context.generation()


def _is_decoder(config: PretrainedConfig) -> bool:
    if config.is_encoder_decoder:
        return False
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return not encoder or getattr(config, "is_decoder", False)
