"""What a stored model answers with some plugins: logits and tokens, bit for bit comparable over processes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftwork.errors import UserError
from graftwork.evaluate.modes import evaluating
from graftwork.generate.decoding import Decoding, decode
from graftwork.generate.prompts import Prompt
from graftwork.models import load_model, load_tokenizer
from graftwork.plugins import Plugins, load_class
from graftwork.recipe import Job
from graftwork.run import Run

PROMPTS = [
    Prompt("The sky is green. What colour is the sky?", "What colour is the sky?"),
    Prompt("Rome lies in France. Where is Rome?", "Where is Rome?"),
]
TOKENS = 8


@dataclass(frozen=True)
class Reading:
    """A hash of the model's logits for the first prompt, and the tokens that were drawn with the plugins."""

    logits: str
    tokens: list[list[int]]


def decoding_run(model: str, plugins: Mapping[str, Mapping[str, Any]]) -> Run:
    """Return the run of a generation, after all checks that need no weights.

    Raises:
        UserError: two plugins cannot decode together, or one refuses.
    """
    job = Job.model_validate({"model": {"ref": model}, "data": {"source": "none"}, "plugins": plugins})
    run = Run(Path(), job, Plugins.from_options(job.plugins))
    run.plugins.check(run)
    return run


def read(model: str, plugins: Mapping[str, Mapping[str, Any]]) -> Reading:
    """Load ``model`` (see :mod:`graftwork.models`) and let it answer twice, with a fixed seed.

    Raises:
        UserError: see :func:`decoding_run`; also what is found out only with the weights there.
    """
    run = decoding_run(model, plugins)
    loaded, tokenizer = load_model(model).eval(), load_tokenizer(model)
    with evaluating(loaded):
        ids = torch.tensor([tokenizer(str(PROMPTS[0].main)).input_ids])
        logits = loaded(input_ids=ids).logits
    torch.manual_seed(0)
    tokens = decode(
        loaded,
        PROMPTS,
        tokenizer=tokenizer,
        decoding=Decoding.from_plugins(run, loaded),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        # Drawn, not greedy: small changes of the logits of a random model rarely change which is largest.
        do_sample=True,
    )
    return Reading(hashlib.sha256(logits.float().numpy().tobytes()).hexdigest(), tokens)


def changed(stored: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the numbers of those among ``stored`` (model, plugins, logits, tokens) that are read otherwise here.

    ``imports`` are the plugins that made a model: the kind of its adapter may be known to one of them only.
    """
    found = []
    for number, one in enumerate(stored):
        for name in one["imports"]:
            load_class(name)
        try:
            again = read(one["model"], one["plugins"])
        except UserError:
            found.append(number)
            continue
        if (again.logits, again.tokens) != (one["logits"], one["tokens"]):
            found.append(number)
    return found
