"""The benchmark ``<plugin>:editing``: edit, measure before and after, take everything back."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from graftwork.data.texts import text_windows
from graftwork.edit.draft import gain_note
from graftwork.edit.editor import Editor
from graftwork.edit.edits import Applied, EditSet
from graftwork.edit.encoding import check_lengths
from graftwork.edit.held import Drift, Held
from graftwork.edit.layouts import read_requests
from graftwork.edit.metrics import WORDS, Asked, Told, ask, mean, metric_id, same, score_of, tell
from graftwork.edit.requests import Request, check_requests
from graftwork.edit.sites import find_sites
from graftwork.edit.statistics import IdentityStatistics, Provider, Statistics, model_digest
from graftwork.errors import UserError
from graftwork.evaluate.benchmarks import Evaluation
from graftwork.hookspecs import Benchmark, Measurement
from graftwork.transform.options import RANDOM

_OTHERS = {
    "score": "S: harmonic mean of efficacy, paraphrase and neighborhood",
    "before_score": "the same before",
    "locality": "share of positions on neighbours and unrelated prompts whose likeliest token is unchanged",
    "immediate_accuracy": "strict accuracy right after the request's own batch was edited, before later ones",
    "drift": "mean KL(before || after) per token on held-out text (nats)",
    "perplexity_ratio": "perplexity on held-out text, after over before",
    "edit_share": "||dW|| / ||W||, mean over the edited weights",
    "edit_lost": "share of changed entries that the model's dtype rounds away",
    "edited_weights": "weights that were edited, mean over batches",
}
METRICS = {
    **WORDS,
    **{f"before_{name}": f"before the edit: {words}" for name, words in WORDS.items()},
    **_OTHERS,
}


class EditingOptions(BaseModel):
    """What is edited, in which batches, and what is measured."""

    model_config = ConfigDict(extra="forbid")

    requests: str | None = Field(
        None,
        min_length=1,
        description="JSONL file of edits, or counterfact:FILE, zsre:FILE, zsre-alt:FILE, facts (generated ones); the "
        "plugin's own if not set",
    )
    limit: int | None = Field(None, ge=1, description="so many requests; all if not set")
    offset: int = Field(0, ge=0, description="leave out the first so many requests")
    unseen_variants: int = Field(
        0,
        ge=0,
        description="the last so many variants of a request are kept from the editor, and they alone are asked",
    )
    batch: int | Literal["all"] = Field("all", description="requests that are edited together")
    sequential: bool = Field(
        False, description="keep earlier batches in the model; off: every batch edits the model as it was"
    )
    corpus: str | None = Field(None, description="text of the second moments; or random")
    window: int = Field(256, ge=8, description="tokens per window of corpus and held-out text")
    corpus_windows: int | None = Field(None, ge=1, description="use the first so many windows of the corpus")
    held_out: str | None = Field(None, description="text that drift is measured on; or random")
    held_out_windows: int = Field(
        8, ge=1, description="windows of the held-out text; 2,000 tokens at least are due"
    )
    generate: bool = Field(True, description="let the model write after each prompt, for generated_accuracy")
    fluency_tokens: int = Field(
        0, ge=0, description="tokens written per request for fluency; 0: none, 100 is usual"
    )


@dataclass
class _Found:
    """What was measured so far, by the request's place in the list."""

    after: dict[int, Told] = field(default_factory=dict)
    immediate: dict[int, float | None] = field(default_factory=dict)
    drifts: list[Drift] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)


def editing_benchmark(name: str, options: Any, make: Callable[[Any], Editor]) -> Benchmark:
    """Return the benchmark of an editor: ``options`` are the plugin's, ``make`` turns them into the editor."""

    def run(evaluation: Evaluation) -> Measurement:
        return measure(evaluation, name, options, make(options))

    return Benchmark(
        f"edits with {name}: do they hold, also in other words, and what else do they change",
        METRICS,
        run,
        EditingOptions,
    )


def measure(evaluation: Evaluation, name: str, options: Any, editor: Editor) -> Measurement:
    """Edit in batches and measure; the model has its weights back at the end, bit for bit.

    Raises:
        RequestError: requests that cannot be made.
        UserError: no requests, or no corpus where the editor looks at second moments.
    """
    asked, model, tokenizer = evaluation.options, evaluation.model, evaluation.tokenizer
    console = evaluation.console
    requests = _requests(asked, options, name)
    check_requests(requests)
    check_lengths(tokenizer, requests, options.max_target_tokens)
    prompts = [ask(tokenizer, _parted(one, asked.unseen_variants)[1]) for one in requests]
    seed = evaluation.run.seed
    statistics = _statistics(evaluation, asked, options, editor, name)
    held = None
    if asked.held_out:
        held = Held(model, _windows(asked.held_out, evaluation, asked.held_out_windows, 1))

    def told(chosen: Sequence[Asked], label: str) -> list[Told]:
        return tell(
            model,
            tokenizer,
            chosen,
            generate=asked.generate,
            fluency_tokens=asked.fluency_tokens,
            console=console,
            label=label,
        )

    before = told(prompts, "before")
    digest = model_digest(model)
    size = len(requests) if asked.batch == "all" else min(asked.batch, len(requests))
    batches = [range(start, min(start + size, len(requests))) for start in range(0, len(requests), size)]
    if asked.sequential and len(batches) > 1:
        # Later batches may choose other sites, and the model is edited by then.
        statistics.collect(find_sites(model))
    found = _Found()
    with contextlib.ExitStack() as kept, console.bar(len(batches), name, "batch") as bar:
        for batch in batches:
            mine = [_parted(requests[i], asked.unseen_variants)[0] for i in batch]
            edits = editor.edit(model, tokenizer, mine, statistics, console=console, seed=seed)
            _note(found, edits)
            with _applied(edits, model, kept if asked.sequential else None):
                now = told([prompts[i] for i in batch], "after")
                found.after |= dict(zip(batch, now, strict=True))
                found.immediate |= {i: one.values["accuracy"] for i, one in zip(batch, now, strict=True)}
                if held is not None and not asked.sequential:
                    found.drifts.append(held.drift(console))
            bar.update(1)
        if asked.sequential:
            if len(batches) > 1:
                found.after = dict(enumerate(told(prompts, "at the end")))
            if held is not None:
                found.drifts.append(held.drift(console))
    if model_digest(model) != digest:
        raise RuntimeError("taking the edits back did not restore the model's weights")
    return _measurement(requests, before, found, metric_id(tokenizer), len(batches))


@contextlib.contextmanager
def _applied(edits: EditSet, model: Any, kept: contextlib.ExitStack | None) -> Iterator[Applied]:
    """Apply edits for the block, or, with ``kept``, for as long as that is open."""
    applied = edits.apply(model)
    if kept is not None:
        kept.enter_context(applied)
        yield applied
    else:
        with applied:
            yield applied


def _parted(request: Request, unseen: int) -> tuple[Request, Request]:
    """Return a request as the editor sees it, and as it is asked, where the last ``unseen`` variants are kept back."""
    if not unseen:
        return request, request
    return (
        dataclasses.replace(request, variants=request.variants[:-unseen]),
        dataclasses.replace(request, variants=request.variants[-unseen:]),
    )


def _requests(asked: EditingOptions, options: Any, name: str) -> list[Request]:
    if asked.requests is not None:
        return read_requests(asked.requests, limit=asked.limit, offset=asked.offset)
    if options.requests is None:
        raise UserError(
            f"benchmark '{name}:editing' edits with requests; set benchmark.requests=FILE, or =facts"
        )
    limit = asked.limit if asked.limit is not None else options.limit
    return read_requests(options.requests, limit=limit, offset=asked.offset or options.offset)


def _statistics(
    evaluation: Evaluation, asked: EditingOptions, options: Any, editor: Editor, name: str
) -> Provider:
    if not editor.uses_statistics or options.statistics == "identity":
        return IdentityStatistics()
    if asked.corpus is None:
        raise UserError(
            f"'{name}' takes second moments of a text; set benchmark.corpus=FILE, or "
            f"plugins.{name}.statistics=identity, a control"
        )
    windows = _windows(asked.corpus, evaluation, asked.corpus_windows, 0)
    return Statistics(
        evaluation.model,
        evaluation.tokenizer,
        windows,
        tokens=options.statistics_tokens,
        console=evaluation.console,
    )


def _windows(text: str, evaluation: Evaluation, count: int | None, salt: int) -> torch.Tensor:
    window = evaluation.options.window
    if text == RANDOM:
        generator = torch.Generator().manual_seed(evaluation.run.seed + salt)
        size = evaluation.model.config.get_text_config().vocab_size
        return torch.randint(size, (count or 8, window), generator=generator)
    return text_windows(Path(text), evaluation.tokenizer, window, count)


def _note(found: _Found, edits: EditSet) -> None:
    sites = edits.report.get("sites", {})
    found.weights.append(len(sites))
    note = gain_note(edits)
    if note:
        found.notes[note] = None
    found.shares += [one["share"] for one in sites.values()]
    found.lost += [one["lost"] for one in sites.values()]


def _measurement(
    requests: Sequence[Request], before: Sequence[Told], found: _Found, identity: str, batches: int
) -> Measurement:
    after = [found.after[i] for i in range(len(requests))]
    items: dict[str, list[float | None]] = {}
    for name in WORDS:
        for head, told in (("", after), ("before_", before)):
            values = [one.values.get(name) for one in told]
            if any(value is not None for value in values):
                items[head + name] = values
    items["immediate_accuracy"] = [found.immediate[i] for i in range(len(requests))]
    locality = [same(a.likeliest, b.likeliest) for a, b in zip(before, after, strict=True)]
    if any(value is not None for value in locality):
        items["locality"] = locality
    means = {name: mean(values) for name, values in items.items()}
    singles: dict[str, float | None] = {
        "score": score_of(means),
        "before_score": score_of({name: means.get(f"before_{name}") for name in WORDS}),
        "edit_share": mean(found.shares),
        "edit_lost": mean(found.lost),
        "edited_weights": mean(found.weights),
    }
    if found.drifts:
        singles["drift"] = mean([one.divergence for one in found.drifts])
        singles["perplexity_ratio"] = mean([one.perplexity_ratio for one in found.drifts])
    rows = [
        {
            **request.record(),
            "metric_id": identity,
            "before": {**old.values, "continuation": old.continuation},
            "after": {**new.values, "continuation": new.continuation},
            "immediate_accuracy": found.immediate[i],
        }
        for i, (request, old, new) in enumerate(zip(requests, before, after, strict=True))
    ]
    notes = [
        f"requests: {len(requests)}, batches: {batches}; figures compare within: {identity}",
        "the weights were restored bit for bit",
        # One sentence is enough where many batches say the same.
        *list(found.notes)[:1],
    ]
    if found.drifts and found.drifts[0].tokens < 2000:
        notes.append(f"drift was measured on {found.drifts[0].tokens} tokens; 2,000 at least are due")
    return Measurement(items, {k: v for k, v in singles.items() if v is not None}, rows=rows, notes=notes)
