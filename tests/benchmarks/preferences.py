"""The same pairs of answers trained by TRL's DPO trainer and by ours with DPO's loss; peak memory as a script."""

from __future__ import annotations

import copy
import gc
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from graftwork import PairBatch, PairLoss, SelfPlay, memory
from graftwork.compat.pair_trainer import PairTrainer
from graftwork.log_probs import answer_log_probs
from graftwork.plugins import Plugins
from graftwork.recipe import Job
from graftwork.run import Run
from graftwork.self_play.options import SelfPlayOptions
from graftwork.self_play.scoring import pad_batch
from graftwork.testing.models import tiny_model, tiny_tokenizer
from graftwork.train.algorithms import build_arguments
from graftwork.train.compose import Composition, compose
from graftwork.train.job import quiet_libraries
from graftwork_kernels.selected_log_probs import selected_log_probs
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer
from trl import DPOConfig, DPOTrainer
from trl.kernels import ChunkedLogProbFunction

# SmolLM2-135M's geometry, random weights.
REAL: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
# Fewer layers and a vocabulary of bytes, so that the head weighs nothing.
SLICE = {**REAL, "num_hidden_layers": 6, "vocab_size": 259}
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
BETA = 0.1
SIDES = {
    "ours": "PairTrainer",
    "dpo": "DPOTrainer",
    "precomputed": "DPOTrainer, references precomputed",
}


def texts(rows: int, length: int) -> list[dict[str, str]]:
    """Return prompts of half of ``length`` tokens with two answers each that fill the rest, the end included."""
    generator = random.Random(0)

    def line(tokens: int) -> str:
        return "".join(generator.choices("abcdefgh ", k=tokens))

    half = length // 2
    return [
        {"prompt": line(half), "chosen": line(length - half - 1), "rejected": line(length - half - 1)}
        for _ in range(rows)
    ]


def dpo(batch: PairBatch) -> PairLoss:
    """Rafailov et al., "Direct Preference Optimization", NeurIPS 2023, equation 7; and what TRL logs of it."""
    target = BETA * (batch.chosen - batch.reference_chosen[:, 0])
    written = BETA * (batch.rejected - batch.reference_rejected[:, 0])
    metrics = {"reward/target": target, "reward/written": written, "margin": target - written}
    return PairLoss(-F.logsigmoid(target - written), metrics)


def build(
    side: str,
    folder: Path,
    *,
    steps: int,
    pairs: int,
    length: int,
    shape: dict[str, Any],
    lora: bool = True,
    loaded: Callable[[], Any] = lambda: None,
) -> Trainer:
    """Return a trainer of ``pairs`` a step; ``loaded`` is called when the model is there and nothing else."""
    model: Any = tiny_model(**shape)
    gc.collect()
    loaded()
    # Gradient checkpointing is on, as it is in DPOConfig where nobody says anything.
    fields: dict[str, Any] = {"max_steps": steps, "per_device_train_batch_size": pairs, "beta": BETA}
    fields |= {"save_strategy": "no", "logging_steps": 1, "max_length": length}
    if side == "precomputed":
        fields["precompute_ref_log_probs"] = True
    arguments: Any = build_arguments(DPOConfig, fields, output_dir=str(folder), seed=0)
    tokenizer = tiny_tokenizer()
    rows = texts(steps * pairs, length)
    # The adapter's first weights are the same on all sides.
    torch.manual_seed(0)
    if side == "ours":
        data = with_references(model, tokenizer, rows, pairs)
        model = get_peft_model(model, LORA) if lora else model
        trainer: Any = compose(PairTrainer)(
            model=model, args=arguments, train_dataset=data, processing_class=tokenizer
        )
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(folder, Job(model={"ref": "tiny"}, data={"source": "generated"}), Plugins.from_options({}))
        play = SelfPlay(SelfPlayOptions(), dpo, token_log_probs=selected_log_probs)
        trainer.begin(play, run, "dpo", 1)
        trainer.attach(Composition.collect(run, trainer.model))
    else:
        # With an adapter the reference is the model without it; with full weights it is a copy.
        reference = {} if lora or side == "precomputed" else {"ref_model": copy.deepcopy(model)}
        trainer = DPOTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LORA if lora else None,
            **reference,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def with_references(model: Any, tokenizer: Any, rows: list[dict[str, str]], pairs: int) -> Dataset:
    """Return the tokens of the pairs, those that TRL makes of the texts, with one reference each."""
    table: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        ids = {f"{name}_ids": tokenizer(text)["input_ids"] for name, text in row.items()}
        for name in ("chosen_ids", "rejected_ids"):
            ids[name].append(tokenizer.eos_token_id)
        table.append({**ids, "item": number})
    for start in range(0, len(table), pairs):
        some = table[start : start + pairs]
        for name in ("chosen", "rejected"):
            batch = pad_batch([(row["prompt_ids"], row[f"{name}_ids"]) for row in some], 0)
            with torch.no_grad():
                answers = batch.pop("completion_mask")
                sums = answer_log_probs(model, batch, answers, token_log_probs=selected_log_probs)
            for row, value in zip(some, sums.tolist(), strict=True):
                row[f"reference_{name}"] = [value]
    return Dataset.from_list(table)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def head_problem(
    tokens: int, *, trained: bool, dtype: torch.dtype, vocabulary: int = REAL["vocab_size"]
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return what makes the log-probabilities of ``tokens`` random tokens, forward and backward, by its side."""
    generator = torch.Generator().manual_seed(0)
    width = REAL["hidden_size"]
    weight = torch.randn(vocabulary, width, generator=generator).mul_(width**-0.5).to(dtype)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight.requires_grad_(trained)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    start = torch.randn(tokens, generator=generator)

    def trl() -> torch.Tensor:
        arguments = (hidden, weight, None, labels, 1.0, 32768, None, 1.0, ("log_probs",))
        return ChunkedLogProbFunction.apply(*arguments)[0]

    def step(forward: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def go() -> torch.Tensor:
            hidden.grad = weight.grad = None
            values = forward()
            values.backward(start)
            return values.detach()

        return go

    return {"ours": step(lambda: selected_log_probs(hidden, weight, labels)), "dpo": step(trl)}


def head_mebibytes(side: str, trained: bool, dtype: torch.dtype) -> dict[str, float]:
    head_problem(16, trained=trained, dtype=dtype, vocabulary=300)[side]()
    step = head_problem(1024, trained=trained, dtype=dtype)[side]
    memory.reset_peak()
    before = memory.peak_bytes()
    step()
    return {"growth": (memory.peak_bytes() - before) / 2**20}


def step_mebibytes(side: str, lora: bool, length: int = 1024) -> dict[str, float]:
    """Train on one pair of ``length`` tokens each; return the peak, and its growth over the model.

    With full weights two steps are taken: in the second the optimizer's moments are there from the beginning.
    Those of the adapter weigh nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        # What libraries allocate once, on a model too small to leave a mark, belongs to the baseline.
        small = {**SLICE, "hidden_size": 36, "intermediate_size": 48}
        build(side, Path(folder) / "small", steps=1, pairs=1, length=16, shape=small, lora=lora).train()
        baseline: list[int] = []

        def loaded() -> None:
            memory.reset_peak()
            baseline.append(memory.peak_bytes())

        trainer = build(
            side,
            Path(folder) / "real",
            steps=1 if lora else 2,
            pairs=1,
            length=length,
            shape=REAL,
            lora=lora,
            loaded=loaded,
        )
        trainer.train()
        peak = memory.peak_bytes()
        return {"peak": peak / 2**20, "growth": (peak - baseline[0]) / 2**20}


if __name__ == "__main__":
    quiet_libraries()
    torch.set_num_threads(1)
    what, side, case, *rest = sys.argv[1:]
    found = (
        head_mebibytes(side, case == "trained", getattr(torch, rest[0]))
        if what == "head"
        else step_mebibytes(side, case == "lora")
    )
    print(json.dumps(found))
