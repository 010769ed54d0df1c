"""What is measured of an edit: protocol section 4. Per request, so that two methods are compared request by request."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graftwork.console import Console
from graftwork.edit.encoding import Row, encode, encode_request
from graftwork.edit.requests import Request
from graftwork.edit.scoring import Scored, score
from graftwork.edit.statistics import tokenizer_digest
from graftwork.evaluate.encoding import encode_prompt, pad_token

Values = dict[str, float | None]

WORDS = {
    "efficacy": "share with p(new) > p(true) on the prompt (ES); p: exp of the mean log-probability per token",
    "efficacy_margin": "p(new) - p(true) on the prompt (EM)",
    "paraphrase": "the same share on paraphrases (PS)",
    "paraphrase_margin": "p(new) - p(true) on paraphrases",
    "neighborhood": "share of neighbours where p(true) > p(new) (NS)",
    "neighborhood_margin": "p(true) - p(new) on neighbours",
    "accuracy": "all tokens of the target are the likeliest, teacher forced (strict)",
    "accuracy_loose": "share of the target's tokens that are the likeliest, teacher forced",
    "paraphrase_accuracy": "strict, on paraphrases",
    "instantiated_accuracy": "strict, with variants in place of the subject",
    "generated_accuracy": "the greedy continuation begins with the target, after normalisation",
    "target_log_prob": "J: mean log-probability per token of the target (nats)",
    "paraphrase_log_prob": "J on paraphrases",
    "instantiated_log_prob": "J with variants in place of the subject",
    "fluency": "entropy of bigrams and trigrams of 100 generated tokens, 2/3 H2 + 4/3 H3 (bits)",
}
"""Measured before and after; the former as ``before_<name>``."""


@dataclass(frozen=True)
class Asked:
    """One request and its prompts as tokens, by kind: with the new target, and (``_true``) with the old."""

    request: Request
    rows: Mapping[str, list[Row]]


@dataclass(frozen=True)
class Told:
    """What a model says to one request.

    Attributes:
        values: metrics by name.
        likeliest: tokens that are the likeliest on neighbours and unrelated prompts, one tensor per prompt.
        continuation: what it writes after the prompt.
    """

    values: Values
    likeliest: list[torch.Tensor]
    continuation: str = ""


def ask(tokenizer: Any, request: Request) -> Asked:
    """Return a request's prompts as tokens. Raises RequestError: see :func:`graftwork.edit.encoding.encode`."""

    def rows(prompts: Sequence[str], target: str | None) -> list[Row]:
        return [encode(tokenizer, one, target=target, where=f"request '{request.id}'") for one in prompts]

    def both(kind: str, prompts: Sequence[str]) -> dict[str, list[Row]]:
        true = request.target_true
        found = {kind: rows(prompts, request.target)}
        return found if true is None else {**found, f"{kind}_true": rows(prompts, true)}

    near = [one for one in request.neighbors if one.target is not None]
    return Asked(
        request,
        {
            **both("prompt", [request.text]),
            **both("paraphrase", request.paraphrases),
            "variant": [encode_request(tokenizer, request, subject=one) for one in request.variants],
            "neighbor": rows([one.prompt for one in near], request.target),
            "neighbor_true": [row for one in near for row in rows([one.prompt], one.target)],
            "beside": [
                row
                for one in (*request.neighbors, *request.locality)
                if one not in near
                for row in rows([one.prompt], one.target)
            ],
        },
    )


def tell(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Asked],
    *,
    generate: bool = True,
    fluency_tokens: int = 0,
    console: Console | None = None,
    label: str = "score",
) -> list[Told]:
    """Return what the model says to every request."""
    rows = [row for one in asked for part in one.rows.values() for row in part]
    console = console or Console(enabled=False)
    with console.bar(len(rows), label, "prompt") as bar:
        scored = iter(score(model, tokenizer, rows, progress=bar.update))
    found = []
    with console.bar(len(asked) if generate or fluency_tokens else 0, f"{label}, written", "request") as bar:
        for one in asked:
            parts = {kind: [next(scored) for _ in part] for kind, part in one.rows.items()}
            values = _values(parts)
            text = ""
            if generate:
                length = len(one.rows["prompt"][0].target) + 4
                text = continuation(model, tokenizer, one.request.text, length)
                values["generated_accuracy"] = float(begins_with(text, one.request.target))
            if fluency_tokens:
                long = continuation(model, tokenizer, one.request.text, fluency_tokens)
                values["fluency"] = fluency(tokenizer(long, verbose=False)["input_ids"])
            beside = [row.likeliest for kind in ("neighbor_true", "beside") for row in parts[kind]]
            found.append(Told(values, beside, text))
            bar.update(1)
    return found


def same(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float | None:
    """Return the share of positions whose likeliest token is the same; None where there is none."""
    pairs = [
        (a, b) for one, other in zip(before, after, strict=True) for a, b in zip(one, other, strict=True)
    ]
    return sum(bool(a == b) for a, b in pairs) / len(pairs) if pairs else None


def score_of(means: Mapping[str, float | None]) -> float | None:
    """Return S, the harmonic mean of efficacy, paraphrase and neighborhood; 0 where any is 0."""
    parts = [means.get(name) for name in ("efficacy", "paraphrase", "neighborhood")]
    known = [one for one in parts if one is not None]
    if len(known) < len(parts):
        return None
    return 0.0 if any(one == 0 for one in known) else len(known) / sum(1 / one for one in known)


def metric_id(tokenizer: Any) -> str:
    """Return what figures of these metrics compare within: definition, boundary rule, tokenizer."""
    return f"editing/1; boundary: joint tokenisation, offsets; tokenizer {tokenizer_digest(tokenizer)[:12]}"


def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Return what the model writes after ``prompt``, greedily."""
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=pad_token(tokenizer),
        )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def begins_with(text: str, target: str) -> bool:
    """Return whether a continuation begins with the target: case and runs of white space do not count."""
    return _plain(text).startswith(_plain(target))


def fluency(ids: Sequence[int]) -> float:
    """Return (2/3) H_2 + (4/3) H_3 with the entropies (bits) of n-grams: low where a text repeats itself."""
    return 2 / 3 * _entropy(ids, 2) + 4 / 3 * _entropy(ids, 3)


# ---------------------------------------------------------------------- inside


def _values(parts: Mapping[str, list[Scored]]) -> Values:
    found: Values = {}
    for kind, share in (("prompt", "efficacy"), ("paraphrase", "paraphrase"), ("neighbor", "neighborhood")):
        pairs = list(zip(parts[kind], parts.get(f"{kind}_true", []), strict=False))
        sign = -1 if kind == "neighbor" else 1
        margins = [sign * (math.exp(new.mean) - math.exp(true.mean)) for new, true in pairs]
        found[share] = mean([float(sign * (new.mean - true.mean) > 0) for new, true in pairs])
        found[f"{share}_margin"] = mean(margins)
    (prompt,) = parts["prompt"]
    found["accuracy"], found["accuracy_loose"] = prompt.strict, prompt.loose
    found["target_log_prob"] = prompt.mean
    for kind, name in (("paraphrase", "paraphrase"), ("variant", "instantiated")):
        found[f"{name}_accuracy"] = mean([one.strict for one in parts[kind]])
        found[f"{name}_log_prob"] = mean([one.mean for one in parts[kind]])
    return found


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of what is known; None where nothing is."""
    known = [one for one in values if one is not None]
    return math.fsum(known) / len(known) if known else None


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().casefold()


def _entropy(ids: Sequence[int], n: int) -> float:
    counts = Counter(zip(*(ids[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0
