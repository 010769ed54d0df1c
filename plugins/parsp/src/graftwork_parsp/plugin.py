"""The hooks of PaRSP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from graftwork import AreaChart, GradientTransform, UserError, hookimpl
from graftwork_kernels import announce

from graftwork_parsp.config import ParspConfig
from graftwork_parsp.model import set_targets
from graftwork_parsp.neurons import find_mlps
from graftwork_parsp.options import ParspOptions
from graftwork_parsp.past import Past
from graftwork_parsp.regions import core_size
from graftwork_parsp.stream import Stream

if TYPE_CHECKING:
    from graftwork.data.tasks import Task
    from graftwork.run import Run
    from transformers import PreTrainedModel, Trainer


class Parsp:
    """Train a sparse core of neurons per task, in directions to which earlier tasks are blind."""

    Options = ParspOptions
    tiny: ClassVar[dict[str, Any]] = {"density": 0.25}
    sharding = frozenset({"zero2"})

    def __init__(self, options: ParspOptions) -> None:
        self.options = options
        self.stream = Stream(options)
        if options.mode == "gradient":
            # DeepSpeed keeps gradients to itself.
            self.sharding = frozenset()

    @hookimpl
    def check(self, run: Run) -> None:
        options, job = self.options, run.job
        if job.algorithm in ("dpo", "grpo"):
            raise UserError(
                f"plugin 'parsp' measures relevance by the loss on answers, which algorithm: {job.algorithm} does not "
                f"have; use algorithm: sft"
            )
        if options.mode == "gradient" and job.adapter:
            raise UserError(
                "plugin 'parsp' with mode: gradient trains the model's own weights; remove 'adapter' from the recipe, "
                "or set plugins.parsp.mode: adapter"
            )
        if options.calibration is not None:
            path = Path(options.calibration)
            if not path.is_absolute() or not path.is_file():
                why = "is a relative path" if not path.is_absolute() else "does not exist"
                raise UserError(
                    f"plugins.parsp.calibration = '{path}' {why}; name a text file by its absolute path, so that a "
                    f"resumed run reads the same"
                )

    @hookimpl
    def adapter_config(self, run: Run, model: PreTrainedModel) -> ParspConfig | None:
        options = self.options
        mlps = self.stream.layout = find_mlps(model, options.names)
        for mlp in mlps:
            if core_size(options.density, mlp.neurons) == 0:
                raise UserError(
                    f"plugins.parsp.density = {options.density:g} of the {mlp.neurons} neurons of '{mlp.name}' is "
                    f"none; raise it to at least {1 / mlp.neurons:.2g}"
                )
        if options.mode == "gradient":
            return None
        fields = ("density", "form", "rank", "down")
        config = ParspConfig(
            task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
            neurons=options.names,
            **options.model_dump(include=set(fields)),
        )
        set_targets(config, mlps)
        return config

    @hookimpl
    def task_stream(self, run: Run, tasks: Sequence[Task]) -> None:
        # The first place that knows how many tasks there are; nothing is loaded or written yet.
        self.stream.check_size(len(tasks))

    @hookimpl
    def task_begin(self, run: Run, task: Task, trainer: Trainer) -> None:
        announce(run.console.say, trainer.args.device)
        self.stream.begin(run, task, trainer)

    @hookimpl
    def transform_gradients(self, run: Run, model: torch.nn.Module) -> Sequence[GradientTransform]:
        rows = self.stream.projected
        return [] if rows is None else [GradientTransform("region", rows.before_step, rows.after_step)]

    @hookimpl
    def task_end(self, run: Run, task: Task, trainer: Trainer) -> None:
        self.stream.end(run, task, trainer)

    @hookimpl
    def save_state(self, run: Run) -> Mapping[str, torch.Tensor] | None:
        return None if self.stream.past is None else self.stream.past.tensors()

    @hookimpl
    def load_state(self, run: Run, state: Mapping[str, torch.Tensor]) -> None:
        if state:
            self.stream.restore(Past.from_tensors(state))

    @hookimpl
    def charts(self, run: Run) -> Sequence[AreaChart]:
        return self.stream.charts()
