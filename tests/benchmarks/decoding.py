"""Decode a fixed number of tokens with the bundled 135M model, and say how long it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from graftwork.generate import Decoding, Prompt, decode
from graftwork.models import BUNDLED, load_model, load_tokenizer
from graftwork.plugins import Plugins, construct
from graftwork.recipe import expand
from graftwork.run import Run
from graftwork.yaml_lines import Document
from turns import now

UNIT = "s" if torch.cuda.is_available() else "CPU s"
PROMPT = Prompt(
    "The river is 12 km long and two boats start at its ends. When do they meet?",
    "Two boats start at the ends of a river. When do they meet each other?",
)


def bundled(dtype: str = "bfloat16") -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct and its tokenizer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load_model(BUNDLED, dtype=dtype)
    return model.to(device).eval(), load_tokenizer(BUNDLED)


def with_plugin(model: Any, name: str, options: Mapping[str, Any]) -> Decoding:
    """Return what a plugin brings to decoding with ``model``."""
    job = expand(Document({"model": BUNDLED, "data": "none"}, {}, "benchmark"), plugins=[name]).jobs[0].job
    return Decoding.from_plugins(Run(Path(), job, Plugins({name: construct(name, options)})), model)


def seconds(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], tokens: int, decoding: Decoding | None = None
) -> tuple[float, list[list[int]]]:
    """Decode ``tokens`` new tokens for every prompt, no fewer; return the seconds and the tokens.

    On a GPU the seconds are those of the clock, on a CPU those that the process computed.
    """
    started = now()
    found = decode(
        model,
        prompts,
        tokenizer=tokenizer,
        decoding=decoding,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
    )
    taken = now() - started
    assert [len(one) for one in found] == [tokens] * len(prompts)
    return taken, found
