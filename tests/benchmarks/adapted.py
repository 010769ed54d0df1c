"""A slice of a real architecture with one method or another on it, and its peak memory when run as a script."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from graftwork import memory
from graftwork.data.tasks import Task
from graftwork.plugins import Plugins
from graftwork.recipe import Job
from graftwork.run import Run
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork.train.adapters import AdapterStack, choose
from graftwork.train.algorithms import algorithm, build_arguments
from graftwork.train.compose import Composition, compose
from graftwork.train.job import quiet_libraries
from transformers import PrinterCallback, Trainer

# SmolLM2-135M's layers, fewer of them, with a byte vocabulary: the adapted layers dominate.
MODEL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 6,
}
BATCH, LENGTH = 4, 128
SHAPE = f"{MODEL['num_hidden_layers']} layers of {MODEL['hidden_size']}, {BATCH} x {LENGTH} tokens"
ADAPTERS = {
    "sparta": "SpaRTA 2+8",
    "lora": "LoRA rank 10",
    "parsp": "PaRSP density 0.05, second task",
    "full": "full gate and up projections",
}
_JOBS = {
    "sparta": {"plugins": {"sparta": {"rank_shared": 2, "rank_specific": 8, "router": "prompt"}}},
    "lora": {"adapter": {"peft_type": "LORA", "r": 10, "lora_alpha": 10, "target_modules": "all-linear"}},
    "parsp": {"plugins": {"parsp": {"density": 0.05}}},
    "full": {},
}


def texts(rows: int) -> Dataset:
    """Return prompts and completions of ``LENGTH`` tokens together, the trainer's end-of-text included."""
    generator = random.Random(0)
    lines = ["".join(generator.choices("abcdefgh ", k=LENGTH - 1)) for _ in range(rows)]
    half = LENGTH // 2
    return Dataset.from_list([{"prompt": line[:half], "completion": line[half:]} for line in lines])


def build(name: str, folder: Path, *, steps: int, **changes: int) -> Trainer:
    """Return the trainer that a job with this adapter runs, loss terms and all; ``changes`` go to the model."""
    return build_run(name, folder, steps=steps, **changes)[1]


def build_run(name: str, folder: Path, *, steps: int, **changes: int) -> tuple[Run, Trainer]:
    """Return the run as well. PaRSP is given its second task, the first whose updates have a past to leave alone."""
    job = Job(model={"ref": "tiny"}, data={"source": "generated"}, **_JOBS[name])
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, job, Plugins.from_options(job.plugins))
    model = tiny_model(**{**MODEL, **changes})
    stack = AdapterStack(choose(run, model), model, "tiny")
    stack.begin("task", seed=0)
    if name == "full":
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(".gate_proj." in key or ".up_proj." in key)
    fields = {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "gradient_checkpointing": False,
        "save_strategy": "no",
    }
    chosen = algorithm("sft")
    trainer = compose(chosen.trainer)(
        model=stack.model,
        args=build_arguments(chosen.config, fields, output_dir=str(folder), seed=0),
        train_dataset=texts(steps * BATCH),
        processing_class=tiny_tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    if name == "parsp":
        first, second = (
            Task(f"task{index}", trainer.train_dataset, index=index, total=2) for index in range(2)
        )
        for hook, task in (("task_begin", first), ("task_end", first), ("task_begin", second)):
            run.plugins.call(hook, run=run, task=task, trainer=trainer)
    trainer.attach(Composition.collect(run, trainer.model))
    return run, trainer


def peak_mebibytes(name: str) -> float:
    """Train for some steps; return the peak over what the process held before the model existed."""
    with tempfile.TemporaryDirectory() as folder:
        # What libraries allocate once, on a model too small to leave a mark, belongs to the baseline.
        build(name, Path(folder), steps=1, hidden_size=36, intermediate_size=48).train()
        memory.reset_peak()
        before = memory.peak_bytes()
        build(name, Path(folder), steps=4).train()
        return (memory.peak_bytes() - before) / 2**20


if __name__ == "__main__":
    quiet_libraries()
    print(json.dumps(peak_mebibytes(sys.argv[1])))
