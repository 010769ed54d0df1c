"""``cale:layers`` measures and chooses; ``cale:no-harm`` asks what the choice costs."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork import Benchmark, LineChart, Measurement
from graftwork.data.conflict import Question, read_questions
from graftwork.evaluate.answer_metrics import contains
from graftwork.evaluate.perplexity import perplexity
from graftwork.evaluate.qa import QaOptions, answer, first_line
from graftwork.generate import Decoding, Prompt, Templates
from graftwork.generate.prompts import as_chat
from pydantic import Field

from graftwork_cale.choose import NEUTRAL, Setting, best, by_divergence, candidates, settings
from graftwork_cale.config import CaleConfig
from graftwork_cale.layers import layers_of, model_id
from graftwork_cale.measure import Item, Profile, encode_item, measure
from graftwork_cale.options import LayersOptions
from graftwork_cale.search import score_settings

if TYPE_CHECKING:
    from graftwork.evaluate.benchmarks import Evaluation

    from graftwork_cale.plugin import Cale

LAYERS_METRICS = {
    "layer": "chosen layer",
    "strength": "chosen strength (1 is off)",
    "f1": "F1 of the choice on these items",
    "f1_off": "F1 without enhancement on these items",
    "answer_below": "ln p of the answer, mean over its tokens: the best layer before the last",
    "answer_last": "ln p of the answer, mean over its tokens: the last layer",
    "answer_below_without": "the same layer without the context",
    "answer_last_without": "the last layer without the context",
    "kl_below": "divergence that the context makes (nats): the largest before the last layer",
    "kl_last": "divergence that the context makes (nats): the last layer",
    "distance": "layers between the choice by growth and the best by F1",
    "lost": "F1 lost by the layer chosen by growth against the best layer",
}


def layers_benchmark() -> Benchmark:
    """Return the benchmark that measures every layer and writes ``cale.json``."""
    return Benchmark(
        "what every layer says about the context's answer; chooses layer and strength, writes cale.json",
        LAYERS_METRICS,
        measure_layers,
        LayersOptions,
    )


def measure_layers(evaluation: Evaluation) -> Measurement:
    """Measure, choose, and hand over curves, scores, ``cale.json`` and a random layer for comparison."""
    options: LayersOptions = evaluation.options
    model, tokenizer = evaluation.model, evaluation.tokenizer
    questions, prompts = ask(options, tokenizer)
    items = [
        encode_item(tokenizer, prompt, question.answers[0], f"'{options.data}' question {question.index}")
        for question, prompt in zip(questions, prompts, strict=True)
    ]
    with evaluation.console.bar(len(items), "layers") as bar:
        profile = measure(model, items, batch_size=options.batch_size, progress=bar.update)
    kl = profile.kl.mean(0).tolist()
    grown = by_divergence(kl, "growth")
    picked = by_divergence(kl, "peak") if options.criterion == "peak" else grown
    scores = _scores(evaluation, options, items, questions, picked)
    chosen = _chosen(options, scores, picked)
    config = CaleConfig(
        model=model_id(model),
        layers=len(kl),
        variant=options.variant,
        layer=chosen.layer,
        strength=chosen.strength,
        positions=options.positions,
        criterion=options.criterion,
        off=chosen.strength == 1,
        curves=profile.curves(),
        scores=[(one.layer, one.strength, _mean(values)) for one, values in scores.items()],
        data=_hash(prompts, questions),
        items=len(items),
    )
    files = {"cale.json": config}
    unaided = config
    if options.criterion == "supervised":
        # What would have been chosen without trying other layers, from the same scores.
        of_one = {one: values for one, values in scores.items() if one.layer in (None, grown)}
        setting = _chosen(options.model_copy(update={"criterion": "growth"}), of_one, grown)
        update = {"layer": grown, "strength": setting.strength, "off": setting.strength == 1}
        unaided = config.model_copy(update={**update, "criterion": "growth"})
        files["growth.json"] = unaided
    files["random-layer.json"] = _random_layer(unaided, evaluation.run.seed)
    return Measurement(
        items=_items(profile, scores, chosen),
        values=_values(chosen, scores, grown, options),
        charts=_charts(profile, scores),
        files={name: one.model_dump() for name, one in files.items()},
        notes=_notes(config, scores, profile),
    )


def _chosen(options: LayersOptions, scores: dict[Setting, list[float]], picked: int) -> Setting:
    """Return the best of ``scores``, or ``picked`` with the only strength where nothing was scored."""
    if not scores:
        return Setting(picked, options.strengths[0])
    found = best({setting: _mean(values) for setting, values in scores.items()})
    # The layer is known by its divergence even where no strength of it helps.
    return Setting(picked, 1.0) if found.layer is None and options.criterion != "supervised" else found


def ask(options: Any, tokenizer: Any) -> tuple[list[Question], list[Prompt]]:
    """Return the questions of a benchmark's options and their prompts, as chats where these are wanted."""
    questions = read_questions(
        Path(options.data),
        templates=Templates(options.templates.with_context, options.templates.without_context),
        documents=options.documents,
        limit=options.limit,
        offset=options.offset,
    )
    chat = bool(tokenizer.chat_template) if options.chat is None else options.chat
    return questions, [as_chat(one.prompt) if chat else one.prompt for one in questions]


def _scores(
    evaluation: Evaluation,
    options: LayersOptions,
    items: Sequence[Item],
    questions: Sequence[Question],
    picked: int,
) -> dict[Setting, list[float]]:
    """Return the F1 of every item for the settings that the criterion leaves open."""
    if not options.score:
        return {}
    layers = candidates(len(layers_of(evaluation.model))) if options.criterion == "supervised" else [picked]
    tried = settings(layers, sorted(set(options.strengths)))
    with evaluation.console.bar(len(tried) * len(items), "settings") as bar:
        found = score_settings(
            evaluation.model,
            evaluation.tokenizer,
            [item.main for item in items],
            [question.answers for question in questions],
            tried,
            variant=options.variant,
            positions=options.positions,
            max_new_tokens=options.max_new_tokens,
            rows=options.rows,
            progress=bar.update,
        )
    return dict(zip(tried, found, strict=True))


def _items(
    profile: Profile, scores: dict[Setting, list[float]], chosen: Setting
) -> dict[str, list[float | None]]:
    assert profile.mean is not None
    assert profile.mean_without is not None
    below = int(profile.mean[:, :-1].mean(0).argmax())
    peak = int(profile.kl[:, :-1].mean(0).argmax())
    found: dict[str, list[float | None]] = {
        "answer_below": profile.mean[:, below].tolist(),
        "answer_last": profile.mean[:, -1].tolist(),
        "answer_below_without": profile.mean_without[:, below].tolist(),
        "answer_last_without": profile.mean_without[:, -1].tolist(),
        "kl_below": profile.kl[:, peak].tolist(),
        "kl_last": profile.kl[:, -1].tolist(),
    }
    if scores:
        found["f1"] = list(scores[NEUTRAL if chosen.strength == 1 else chosen])
        found["f1_off"] = list(scores[NEUTRAL])
    return found


def _values(
    chosen: Setting, scores: dict[Setting, list[float]], grown: int, options: LayersOptions
) -> dict[str, float | None]:
    values: dict[str, float | None] = {
        "layer": None if chosen.layer is None else float(chosen.layer),
        "strength": chosen.strength,
    }
    if options.criterion == "supervised":
        means = {setting: _mean(one) for setting, one in scores.items()}
        layers = {
            one.layer: max(means[other] for other in means if other.layer == one.layer) for one in means
        }
        enhanced = {layer: value for layer, value in layers.items() if layer is not None}
        top = max(enhanced, key=lambda layer: (enhanced[layer], -abs(layer - grown)))
        values["distance"] = float(abs(top - grown))
        values["lost"] = enhanced[top] - enhanced[grown]
    return values


def _charts(profile: Profile, scores: dict[Setting, list[float]]) -> list[LineChart]:
    curves = profile.curves()
    charts = [
        LineChart(
            "What each layer says of the context's answer",
            "The model's own norm and head read every layer: ln p of the answer, mean over its tokens and over "
            "items. Where the curve is highest before the last layer, the model loses what it had.",
            "layer",
            "ln p",
            {
                "with context": _points(curves["mean"]),
                "without context": _points(curves["mean_without"]),
                "first token, with": _points(curves["first"]),
                "first token, without": _points(curves["first_without"]),
            },
        ),
        LineChart(
            "What the context changes in each layer",
            "KL divergence of a layer's predictions with the context from those without it, at the first "
            "token of the answer; mean over items.",
            "layer",
            "nats",
            {"divergence": _points(curves["kl"])},
        ),
    ]
    strengths = sorted({setting.strength for setting in scores if setting.layer is not None})
    layers = sorted({setting.layer for setting in scores if setting.layer is not None})
    off = _mean(scores[NEUTRAL]) if scores else 0.0
    if len(layers) > 1:
        series = {
            f"strength {strength:g}": [
                (float(layer), _mean(scores[Setting(layer, strength)])) for layer in layers
            ]
            for strength in strengths
        }
        series["off"] = [(float(layer), off) for layer in layers]
        charts.append(
            LineChart("F1 of every layer", "On the items the choice is made on.", "layer", "F1", series)
        )
    elif layers:
        points = [(1.0, off), *((s, _mean(scores[Setting(layers[0], s)])) for s in strengths)]
        charts.append(
            LineChart(
                f"F1 of layer {layers[0]}",
                "On the items the choice is made on; strength 1 is off.",
                "strength",
                "F1",
                {f"layer {layers[0]}": sorted(points)},
            )
        )
    return charts


def _notes(config: CaleConfig, scores: dict[Setting, list[float]], profile: Profile) -> list[str]:
    tried = f"{len(scores)} settings on {config.items} items"
    if config.off:
        where = "" if config.layer is None else f" of layer {config.layer}"
        return [f"off: no strength{where} scores better than the model as it is ({tried})"]
    added = abs(config.strength - 1) * float(profile.norm[:, (config.layer or 1) - 1].mean())
    how = f"the best of {tried}" if scores else f"by {config.criterion}, strength as given"
    return [
        f"layer {config.layer} of {config.layers}, strength {config.strength:g} ({how}); what is added is "
        f"{added:.2f} of the last layer's norm"
    ]


def _random_layer(config: CaleConfig, seed: int) -> CaleConfig:
    """Return the control: the same strength at a drawn candidate, another one where there is another."""
    others = [layer for layer in candidates(config.layers) if layer != config.layer]
    layer = random.Random(seed).choice(others or [config.layer])
    return config.model_copy(update={"layer": layer})


def _hash(prompts: Sequence[Prompt], questions: Sequence[Question]) -> str:
    content = [
        [prompt.main, prompt.contrast, list(question.answers)]
        for prompt, question in zip(prompts, questions, strict=True)
    ]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def _points(values: Sequence[float]) -> list[tuple[float, float]]:
    return [(float(layer), value) for layer, value in enumerate(values, 1)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


NO_HARM_METRICS = {
    "kept": "of items right without CaLE, the share still right with it",
    "gained": "of items wrong without CaLE, the share right with it",
    "right": "share of items right with CaLE (a gold answer stands in the answer)",
    "right_off": "share of items right without CaLE",
    "perplexity": "perplexity of the text with CaLE at every position",
    "perplexity_off": "perplexity of the text without CaLE",
}


class NoHarmOptions(QaOptions):
    """Options of the benchmark ``cale:no-harm``: those of ``qa``, and a text."""

    text: str | None = Field(None, description="a text (.txt or .jsonl) for perplexity")
    window: int = Field(256, ge=2, description="tokens per window of the text")
    windows: int | None = Field(16, ge=1, description="so many windows; null takes all")


def no_harm_benchmark(plugin: Cale) -> Benchmark:
    """Return the benchmark that compares a model with and without what ``plugin`` does to it."""
    return Benchmark(
        "answers that CaLE keeps right, and the perplexity it costs",
        NO_HARM_METRICS,
        lambda evaluation: measure_no_harm(evaluation, plugin),
        NoHarmOptions,
    )


def measure_no_harm(evaluation: Evaluation, plugin: Cale) -> Measurement:
    """Answer every question without and with the plugins of the run, and read the text both ways."""
    options: NoHarmOptions = evaluation.options
    questions, prompts = ask(options, evaluation.tokenizer)
    right: list[list[float]] = []
    texts: list[list[str]] = []
    with plugin.enhanced(evaluation.model):
        # Refuse before the long part begins.
        pass
    for decoding, label in ((Decoding(), "off"), (evaluation.decoding, "on")):
        tokens = answer(evaluation, prompts, decoding, label)
        texts.append([first_line(evaluation.tokenizer, one) for one in tokens])
        right.append([contains(text, one.answers) for text, one in zip(texts[-1], questions, strict=True)])
    values: dict[str, float | None] = {}
    if options.text is not None:
        given: dict[str, Any] = {"window": options.window, "max_windows": options.windows}
        read = (evaluation.model, evaluation.tokenizer, Path(options.text))
        values["perplexity_off"] = float(perplexity(*read, **given)["perplexity"])
        # Every position of a text predicts.
        with plugin.enhanced(evaluation.model, positions="all"):
            values["perplexity"] = float(perplexity(*read, **given)["perplexity"])
    pairs = list(zip(*right, strict=True))
    return Measurement(
        items={
            "kept": [after if before else None for before, after in pairs],
            "gained": [None if before else after for before, after in pairs],
            "right": right[1],
            "right_off": right[0],
        },
        values=values,
        rows=[
            {"question": one.question, "answers": list(one.answers), "off": off, "on": on}
            for one, off, on in zip(questions, *texts, strict=True)
        ],
    )
