"""Compose any transformers or TRL trainer class with the loss terms and gradient transforms of plugins.

The trainer's own class is extended through what its documentation says may be overridden:
``compute_loss``, ``training_step``, ``create_optimizer``, ``log``, and callbacks. With no plugin the
composed class computes exactly what the plain one does, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import Trainer, TrainerCallback

from graftwork.compat.trainer import keep_adapter_activity, loss_is_scaled
from graftwork.errors import PluginError, UserError
from graftwork.hookspecs import GradientTransform, LossTerm

if TYPE_CHECKING:
    from graftwork.run import Run


@dataclass
class Composition:
    """What plugins add to one task's trainer, each part with the plugin it came from.

    ``observed`` is the run whose plugins want to see every batch, or None where no plugin does.
    """

    terms: list[tuple[str, LossTerm]] = field(default_factory=list)
    transforms: list[tuple[str, GradientTransform]] = field(default_factory=list)
    factors: dict[str, float] = field(default_factory=dict)
    observed: Run | None = None

    @classmethod
    def collect(cls, run: Run, model: torch.nn.Module) -> Composition:
        """Ask every plugin of ``run`` what it adds for the task about to start."""
        terms = _flat(run.plugins.call("loss_terms", run=run, model=model))
        seen: dict[str, str] = {}
        for plugin, term in terms:
            if term.name in seen:
                raise UserError(
                    f"plugins '{seen[term.name]}' and '{plugin}' both add a loss term named '{term.name}' "
                    f"(hook loss_terms); leave one of them out"
                )
            seen[term.name] = plugin
        transforms = _flat(run.plugins.call("transform_gradients", run=run, model=model))
        factors: dict[str, float] = {}
        for plugin, mapping in run.plugins.call("learning_rate_factors", run=run, model=model):
            known = {name for name, _ in model.named_parameters()}
            for name, factor in mapping.items():
                if name not in known:
                    raise PluginError(plugin, "learning_rate_factors", KeyError(f"no parameter '{name}'"))
                factors[name] = factors.get(name, 1.0) * factor
        observed = run if run.plugins.implements("batch_begin") else None
        return cls(terms, transforms, factors, observed)


def _flat(results: Sequence[tuple[str, Sequence[Any]]]) -> list[tuple[str, Any]]:
    return [(plugin, item) for plugin, items in results for item in items]


def compose(trainer_class: type[Trainer]) -> type[Trainer]:
    """Return ``trainer_class`` extended by :class:`Composed`; attach a :class:`Composition` before training."""
    return type(trainer_class.__name__, (Composed, trainer_class), {"__module__": trainer_class.__module__})


class Composed(Trainer):
    """Mixin in front of a trainer class; see :func:`compose`."""

    composition = Composition()

    def attach(self, composition: Composition) -> None:
        """Use ``composition`` from the next step on; call before ``train``."""
        if composition.transforms and self.is_deepspeed_enabled:
            plugin = composition.transforms[0][0]
            raise UserError(
                f"plugin '{plugin}' edits gradients (hook transform_gradients), which DeepSpeed keeps to itself; "
                f"run without 'deepspeed' or without the plugin"
            )
        self.composition = composition
        self._micro_batch = 0
        self._term_sums: dict[str, torch.Tensor] = {}
        self._term_steps = 0
        self._unwrapped: tuple[Any, Any] = (None, None)
        self._factored: Any = None
        if composition.transforms:
            self.add_callback(_AfterStep(composition))

    # ------------------------------------------------------------------ what trainers let us override

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        parts = self.composition
        if not model.training or not (parts.terms or parts.observed):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        bare = self._bare(model)
        if parts.observed is not None:
            parts.observed.plugins.call("batch_begin", run=parts.observed, model=bare, batch=inputs)
        # Trainers pop and add keys while they compute; the terms see the batch as it came.
        batch = dict(inputs)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not parts.terms:
            return result
        loss, outputs = cast(Any, result) if return_outputs else (cast(torch.Tensor, result), None)
        loss = loss + self._extra_loss(bare, batch, loss_is_scaled(self, num_items_in_batch))
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not self.accelerator.sync_gradients:
            self._micro_batch += 1
            return loss
        self._micro_batch = 0
        self._term_steps += 1
        for plugin, transform in self.composition.transforms:
            if transform.before_step is not None:
                _guarded(
                    plugin,
                    "transform_gradients",
                    transform.before_step,
                    self._bare(cast(Any, self.model)),
                )
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        # With DeepSpeed this is asked twice for the same optimizer.
        if self.composition.factors and optimizer is not self._factored:
            _split_groups(optimizer, cast(Any, self.model), self.composition.factors)
            self._factored = optimizer
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self._mean_terms())
            if not math.isfinite(logs["loss"]):
                raise UserError(
                    f"the training loss is {logs['loss']} at step {self.state.global_step}; "
                    f"lower 'learning_rate', or look at the data that this step read"
                )
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        with keep_adapter_activity(model or cast(Any, self.model)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        folder = kwargs.get("resume_from_checkpoint")
        if folder is None or self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
            return
        # The checkpoint of the very last step: the Trainer would take one more before it looks at their number.
        self._load_rng_state(folder)
        self.control.should_training_stop = True
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)

    def _bare(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return ``model`` without what distributes it; looked up once, since that walks all modules."""
        if self._unwrapped[0] is not model:
            self._unwrapped = (model, self.accelerator.unwrap_model(model))
        return self._unwrapped[1]

    # ------------------------------------------------------------------ loss terms

    def _extra_loss(
        self, model: torch.nn.Module, batch: Mapping[str, Any], scaled: bool
    ) -> torch.Tensor | float:
        """Sum the terms so that the step's gradient is that of ``weight * term``.

        Where the trainer's loss is already normalised over the accumulated batch (``scaled``) nothing
        divides by the number of micro-batches later; where it is not, the trainer divides ours too.
        """
        steps = self.current_gradient_accumulation_steps
        total: torch.Tensor | float = 0.0
        for plugin, term in self.composition.terms:
            if term.per == "step" and self._micro_batch > 0:
                continue
            value = _guarded(plugin, "loss_terms", term.fn, model, batch)
            share = 1 / steps if term.per == "batch" else 1.0
            self._term_sums[term.name] = self._term_sums.get(term.name, 0) + value.detach().float() * share
            total = total + value * (term.weight * share * (1 if scaled else steps))
        return total

    def _mean_terms(self) -> dict[str, float]:
        # Not the difference of global steps: a resumed trainer learns its global step only in train().
        steps = max(self._term_steps, 1)
        self._term_steps = 0
        means = {}
        for name, value in self._term_sums.items():
            if self.args.world_size > 1:
                value = cast(torch.Tensor, self.accelerator.gather(value.reshape(1))).mean()
            means[f"loss/{name}"] = value.item() / steps
        self._term_sums = {}
        return means


class _AfterStep(TrainerCallback):
    def __init__(self, composition: Composition) -> None:
        self.composition = composition

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        for plugin, transform in self.composition.transforms:
            if transform.after_step is not None:
                _guarded(plugin, "transform_gradients", transform.after_step, model)


def _guarded(plugin: str, hook: str, function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except UserError:
        raise
    except Exception as error:
        raise PluginError(plugin, hook, error) from error


def _split_groups(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, factors: Mapping[str, float]
) -> None:
    """Give parameters with a learning-rate factor groups of their own."""
    by_identity = {id(parameter): factors.get(name, 1.0) for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        for factor in sorted({by_identity.get(id(p), 1.0) for p in group["params"]}):
            members = [p for p in group["params"] if by_identity.get(id(p), 1.0) == factor]
            groups.append({**group, "params": members, "lr": group["lr"] * factor})
    optimizer.param_groups[:] = groups
