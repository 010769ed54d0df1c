"""The benchmark ``steps``: at how many steps does the method do anything, and what does each part of it do?"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from graftwork import Benchmark, Combiner, Measurement, UserError
from graftwork.evaluate.qa import QaOptions, asked
from graftwork.generate import Trace, decode
from graftwork.generate.contrast import tilt

from graftwork_coiecd.scores import Coiecd, Sets, entropy

if TYPE_CHECKING:
    from graftwork.evaluate.benchmarks import Evaluation

METRICS = {
    "plausible": "share of steps with two or more plausible tokens (tokens beyond the lower bound)",
    "changed": "share of steps whose likeliest token is not the context's",
    "violating": "share of chosen tokens that are violating",
    "entropy": "share of steps whose sets change when the entropy is left out of the official code's form",
    "closed_form": "share of steps whose sets in that form are not those of the closed form",
    "upper": "share of steps that choose another token when the upper bound is left out",
    "steps": "steps that were counted",
}


def literal_sets(main: torch.Tensor, contrast: torch.Tensor, ratio: float, *, entropy_too: bool) -> Sets:
    """Return the sets of the official code's form: a softmax over information minus entropy, and two bounds.

    ``entropy_too``: with the entropy in it, or with 0 in its place. All bool, B x V.
    """
    information = -main.log_softmax(-1)
    shift = entropy(contrast.log_softmax(-1)) if entropy_too else 0.0
    normalised = (information - shift).log_softmax(-1)
    margin = math.log(ratio)
    lower = normalised < normalised.amin(-1, keepdim=True) + margin
    lower &= lower.sum(-1, keepdim=True) != 1
    return lower, normalised > normalised.amax(-1, keepdim=True) - margin


class Counted(Trace):
    """Count what happens at every step of rows that go on; keeps no candidates."""

    def __init__(self, method: Coiecd) -> None:
        super().__init__()
        self.method = method
        self.counts: Counter[str] = Counter()

    def add(
        self,
        combiner: Combiner,
        main: torch.Tensor,
        contrast: torch.Tensor,
        scores: torch.Tensor,
        tokens: torch.Tensor,
        live: torch.Tensor,
    ) -> None:
        main, contrast, scores, tokens = (part[live] for part in (main, contrast, scores, tokens))
        method = self.method
        lower, upper = method.sets(main, contrast)
        chosen = (lower | upper).gather(-1, tokens[:, None])
        found = {
            "steps": torch.ones_like(tokens, dtype=torch.bool),
            "plausible": lower.any(-1),
            "changed": scores.argmax(-1) != main.argmax(-1),
            "violating": chosen.squeeze(-1),
        }
        if method.constraint == "softmax" and method.ratio < math.inf:
            with_, without = (
                literal_sets(main, contrast, method.ratio, entropy_too=too) for too in (True, False)
            )
            weight = torch.where(lower, main.new_tensor(method.alpha), main.new_tensor(method.alpha - 1.0))
            found |= {
                "entropy": _differ(with_, without),
                "closed_form": _differ(with_, (lower, upper)),
            }
            if not method.swapped:
                found["upper"] = tilt(main, contrast, weight).argmax(-1) != scores.argmax(-1)
        self.counts.update({name: int(where.sum()) for name, where in found.items()})


def _differ(one: Sets, other: Sets) -> torch.Tensor:
    """Return the rows (bool B) whose sets are not the same."""
    return ((one[0] != other[0]) | (one[1] != other[1])).any(-1)


def benchmark(method: Coiecd) -> Benchmark:
    """Return the benchmark of one setting of the method; it takes the options of the benchmark ``qa``."""

    def measure(evaluation: Evaluation) -> Measurement:
        return _measure(evaluation, method)

    return Benchmark(
        summary="what the method does at every step of its answers to questions with a context",
        metrics=METRICS,
        measure=measure,
        options=QaOptions,
    )


def _measure(evaluation: Evaluation, method: Coiecd) -> Measurement:
    options: QaOptions = evaluation.options
    other = evaluation.decoding.combiner
    if other is not None and other.name != "coiecd":
        raise UserError(
            f"benchmark 'coiecd:steps' follows COIECD's own text, and plugin '{other.name}' decodes another; leave "
            f"it out"
        )
    tokenizer: Any = evaluation.tokenizer
    _, prompts = asked(options, tokenizer)
    counted = Counted(method)
    decoding = dataclasses.replace(evaluation.decoding, combiner=Combiner("coiecd", method.scores))
    with evaluation.console.bar(len(prompts), "steps") as bar:
        for start in range(0, len(prompts), options.batch_size):
            batch = prompts[start : start + options.batch_size]
            decode(
                evaluation.model,
                batch,
                tokenizer=tokenizer,
                decoding=decoding,
                trace=counted,
                first_line=True,
                max_prompt_tokens=options.max_prompt_tokens,
                max_new_tokens=options.max_new_tokens,
                do_sample=False,
            )
            bar.update(len(batch))
    steps = counted.counts.pop("steps", 0)
    shares = {name: count / steps for name, count in counted.counts.items()}
    return Measurement(items={}, values={**shares, "steps": float(steps)})
