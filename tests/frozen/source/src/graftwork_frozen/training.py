"""All hooks of a training run but self-play."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from graftwork import Adapter, AreaChart, GradientTransform, LossTerm, TrainingAlgorithm, UserError, hookimpl
from graftwork.data.layouts import RawTask
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field
from trl import SFTConfig, SFTTrainer

from graftwork_frozen import saw


@dataclass
class FrozenConfig(SFTConfig):
    """A config with a field of its own."""

    frozen_factor: float = field(default=1.0, metadata={"help": "factor of the loss"})


class FrozenTrainer(SFTTrainer):
    """A trainer whose loss has a factor."""

    def compute_loss(self, *args, **kwargs):
        saw("compute_loss", self.args.frozen_factor)
        return self.args.frozen_factor * super().compute_loss(*args, **kwargs)


class Options(BaseModel):
    """Options of frozen-training."""

    model_config = ConfigDict(extra="forbid")

    refuse: bool = Field(False, description="refuse every run")
    interrupt: str = Field("", description="stop at the beginning of this task")


class Training:
    """Takes part in everything that happens while a model is trained."""

    Options = Options

    def __init__(self, options: Options) -> None:
        self.options = options
        self.finished = 0

    @hookimpl
    def check(self, run):
        saw("check")
        if self.options.refuse:
            raise UserError("plugin 'frozen-training' refuses, as it was asked to; leave refuse out")

    @hookimpl
    def data_sources(self, run):
        def reader(name):
            items = [{"prompt": f"{name} {number}?", "completion": str(number)} for number in range(12)]
            return lambda: RawTask(name, "completion", items, items[:2])

        def layout(path):
            saw("data_sources", str(path))
            return {name: reader(name) for name in ("one", "two")}

        return {"frozen": layout}

    @hookimpl
    def task_stream(self, run, tasks):
        saw("task_stream", [(task.name, len(task.train)) for task in tasks])
        return [replace(task, train=task.train.select(range(10))) for task in tasks]

    @hookimpl
    def adapter_config(self, run, model):
        saw("adapter_config", model.config.model_type)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        return Adapter(LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"), policy="shared")

    @hookimpl
    def training_algorithm(self, run):
        saw("training_algorithm")
        return TrainingAlgorithm(FrozenTrainer, FrozenConfig)

    @hookimpl
    def training_data(self, run, task, dataset):
        saw("training_data", (task.name, len(dataset)))
        return dataset.select(range(8))

    @hookimpl
    def task_begin(self, run, task, trainer):
        saw("task_begin", (task.name, len(trainer.train_dataset)))
        if task.name == self.options.interrupt:
            raise KeyboardInterrupt

    @hookimpl
    def loss_terms(self, run, model):
        saw("loss_terms")
        sizes = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fn = lambda model, batch: sum(one.square().sum() for one in sizes)  # noqa: E731
        return [LossTerm("frozen", fn, weight=0.01, per="step")]

    @hookimpl
    def transform_gradients(self, run, model):
        saw("transform_gradients")

        def before(model):
            for name, parameter in model.named_parameters():
                if "q_proj.lora_B" in name:
                    parameter.grad.zero_()

        def after(model):
            for name, parameter in model.named_parameters():
                if "k_proj.lora_B" in name:
                    with torch.no_grad():
                        parameter.clamp_(-1e-3, 1e-3)

        return [GradientTransform("frozen", before, after)]

    @hookimpl
    def learning_rate_factors(self, run, model):
        saw("learning_rate_factors")
        return {name: 0.0 for name, _ in model.named_parameters() if "v_proj.lora_B" in name}

    @hookimpl
    def batch_begin(self, run, model, batch):
        saw("batch_begin", tuple(batch["input_ids"].shape))

    @hookimpl
    def task_end(self, run, task, trainer):
        saw("task_end", (task.name, trainer.state.global_step))
        self.finished += 1

    @hookimpl
    def save_state(self, run):
        saw("save_state", self.finished)
        return {"finished": torch.tensor(self.finished)}

    @hookimpl
    def load_state(self, run, state):
        self.finished = int(state["finished"])
        saw("load_state", self.finished)

    @hookimpl
    def charts(self, run):
        saw("charts", self.finished)
        return [AreaChart("Frozen tasks", "How many were finished.", ["all"], {"done": [self.finished / 10]})]
