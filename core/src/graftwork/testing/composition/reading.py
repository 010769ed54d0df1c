"""What a stored model answers with some plugins: logits and tokens, bit for bit comparable over processes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor

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
    """Hashes of the model's logits for the first prompt and of the scores that tokens were drawn from with the plugins;
    and the tokens."""

    logits: str
    scores: str
    tokens: list[list[int]]


class _Seen(LogitsProcessor):
    """Keeps a hash of all scores that come by, after combiners and all other processors."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self.hash.update(scores.float().numpy().tobytes())
        return scores


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
    seen, decoding = _Seen(), Decoding.from_plugins(run, loaded)
    tokens = decode(
        loaded,
        PROMPTS,
        tokenizer=tokenizer,
        decoding=replace(decoding, processors=(*decoding.processors, seen)),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        # Drawn, not greedy: small changes of the logits of a random model rarely change which is largest.
        do_sample=True,
    )
    first = hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()
    return Reading(first, seen.hash.hexdigest(), tokens)


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
        if any(value != one[key] for key, value in asdict(again).items()):
            found.append(number)
    return found
