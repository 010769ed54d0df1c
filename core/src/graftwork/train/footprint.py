"""How much memory one GPU needs for a job, by counting: an estimate, each part with what it assumes.

Weights, gradients and optimizer state follow from the parameters and from what DeepSpeed or FSDP2 shards or offloads.
Activations are an upper bound. State that a method keeps outside of the model's parameters is not known here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graftwork.models import is_encoder_decoder
from graftwork.train.deepspeed import read_config
from graftwork.train.sharding import fsdp_config, kind_of

HALF, FULL = 2, 4
BYTES = {"float32": FULL, "bfloat16": HALF, "float16": HALF}


@dataclass(frozen=True)
class Sharding:
    """The number of GPUs and what is sharded over them; ``stage`` is None without DeepSpeed, ``fsdp`` is FSDP2."""

    gpus: int = 1
    stage: int | None = None
    half: bool = False
    optimizer_offloaded: bool = False
    weights_offloaded: bool = False
    fsdp: bool = False

    @classmethod
    def of(cls, train: Mapping[str, Any], gpus: int, *, half: bool) -> Sharding:
        """Return what ``train`` asks for; ``half``: the trainer's own bf16 or fp16 is on."""
        if kind_of(train) == "fsdp2":
            away = str(fsdp_config(train).get("cpu_offload", False)).lower() == "true"
            return cls(gpus, None, half, away, away, fsdp=True)
        settings = read_config(train)
        if settings is None:
            return cls(gpus, half=half)
        zero = settings.get("zero_optimization") or {}
        asked = [(settings.get(kind) or {}).get("enabled", False) for kind in ("bf16", "fp16")]

        def offloaded(name: str) -> bool:
            return (zero.get(name) or {}).get("device", "none") != "none"

        return cls(
            gpus,
            int(zero.get("stage", 0)),
            any(half if value == "auto" else value for value in asked),
            offloaded("offload_optimizer"),
            offloaded("offload_param"),
        )

    def words(self) -> str:
        """Return the sharding as a reader of the estimate needs it."""
        gpus = f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}"
        if self.fsdp:
            away = "; all of it offloaded" if self.weights_offloaded else ""
            return f"{gpus}, FSDP2: optimizer state, gradients, weights sharded{away}"
        if self.stage is None:
            return f"{gpus}, nothing sharded" if self.gpus > 1 else gpus
        parts = ["optimizer state", "gradients", "weights"][: self.stage]
        shared = f"{', '.join(parts)} sharded" if parts and self.gpus > 1 else "nothing to shard"
        held = [
            name
            for name, away in (
                ("optimizer state and gradients", self.optimizer_offloaded),
                ("weights", self.weights_offloaded),
            )
            if away
        ]
        return f"{gpus}, ZeRO stage {self.stage}: {shared}" + (
            f"; {', '.join(held)} offloaded" if held else ""
        )


@dataclass(frozen=True)
class State:
    """Bytes per GPU of what stays there from step to step."""

    weights: float
    gradients: float
    optimizer: float


def state(frozen: int, trained: int, *, frozen_bytes: int, trained_bytes: int, sharding: Sharding) -> State:
    """Return what ``frozen`` and ``trained`` parameters cost, with Adam.

    Without DeepSpeed a gradient and both moments have the trained parameter's own precision. DeepSpeed holds
    all weights in one precision (2 bytes where ``sharding.half``), gradients too, and in the optimizer an fp32
    copy and both moments, 12 bytes (Rajbhandari et al., "ZeRO", 2020, section 3.1). Stage 1 shards the
    optimizer's part, 2 also gradients, 3 also weights. Offloading the optimizer takes the gradients with it.

    FSDP2 shards all of it, one layer's weights apart, and holds what it trains in fp32 where ``sharding.half``; what
    it offloads is the whole.
    """
    if sharding.fsdp:
        one = trained * (FULL if sharding.half else trained_bytes)
        share = 0 if sharding.weights_offloaded else 1 / sharding.gpus
        return State((frozen * frozen_bytes + one) * share, one * share, 2 * one * share)
    if sharding.stage is None:
        one = trained * trained_bytes
        return State(frozen * frozen_bytes + one, one, 2 * one)
    size = HALF if sharding.half else FULL

    def per_gpu(value: float, from_stage: int, offloaded: bool) -> float:
        if offloaded:
            return 0
        return value / sharding.gpus if sharding.stage is not None and sharding.stage >= from_stage else value

    return State(
        per_gpu((frozen + trained) * size, 3, sharding.weights_offloaded),
        per_gpu(trained * size, 2, sharding.optimizer_offloaded),
        per_gpu(trained * 12, 1, sharding.optimizer_offloaded),
    )


def activations(
    config: Any, *, rows: int, prompt: int, answer: int, checkpointing: bool, compute_bytes: int
) -> float:
    """Return an upper bound on what the backward pass of ``rows`` items needs, in bytes.

    Per token and layer about 17 hidden and 3 intermediate widths (what a pre-norm block keeps); a decoder that
    looks at an encoder keeps 8 widths more, and two per token of the prompt. With gradient checkpointing that is
    so for one layer at a time, and the others keep one hidden state per token. The logits count once in fp32
    with their gradient. ``prompt`` and ``answer`` are tokens per item; a decoder reads them as one text.
    Attention scores are not kept (SDPA or flash attention).
    """
    text = config.get_text_config()
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    middle = getattr(text, "intermediate_size", None) or getattr(text, "d_ff", None) or 4 * hidden
    block = 17 * hidden + 3 * int(middle)
    logits = 2 * FULL * int(text.vocab_size)

    def stack(depth: int, of_one: float, width: float) -> float:
        return depth * width + of_one if checkpointing else depth * of_one

    if not is_encoder_decoder(config):
        tokens = prompt + answer
        return rows * tokens * (stack(layers, block, hidden) * compute_bytes + logits)
    deep = int(getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", layers))
    encoder = stack(layers, prompt * block, prompt * hidden)
    decoder = stack(deep, answer * (block + 8 * hidden) + prompt * 2 * hidden, answer * hidden)
    return rows * ((encoder + decoder) * compute_bytes + answer * logits)


def default(config_class: type[Any], train: Mapping[str, Any], field: str) -> Any:
    """Return the trainer's field as the recipe sets it, or the default of the trainer's config class."""
    if field in train:
        return train[field]
    return next((f.default for f in dataclasses.fields(config_class) if f.name == field), None)
