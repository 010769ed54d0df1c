"""The benchmark ``mmer:expansion``: two experts of one base, one modality each; questions that need both."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from graftwork import Benchmark, Measurement, UserError
from graftwork.evaluate.benchmarks import Evaluation
from graftwork.merge.experts import Experts
from graftwork.merge.options import MergeOptions
from graftwork.transform.source import CheckpointSource
from pydantic import BaseModel, ConfigDict, Field

from graftwork_mmer.artefact import Artefact
from graftwork_mmer.expansion.connectors import CONNECTORS
from graftwork_mmer.expansion.data import RENDER, Kind, Question, draw_question
from graftwork_mmer.expansion.learn import TEXT, learn, templates_of, token_ids
from graftwork_mmer.method import MmerMethod
from graftwork_mmer.multimodal.prompt import Media, Prompt, assemble
from graftwork_mmer.options import MmerOptions
from graftwork_mmer.routed.deltas import Deltas, KeptDeltas, MaskedDeltas
from graftwork_mmer.routed.model import RoutedModel
from graftwork_mmer.routed.plan import TEXT as TEXT_ROUTE
from graftwork_mmer.routed.plan import TextRoute

KINDS: tuple[Kind, ...] = ("glyph", "wave")


@dataclass(frozen=True)
class Arm:
    """A way to answer: whose deltas, how text goes, and whether media go the same way (``flat``)."""

    words: str
    masked: bool
    text: TextRoute
    flat: bool = False


ARMS = {
    "base": Arm("the base with the experts' connectors", False, "base", flat=True),
    "average": Arm("the mean of both experts, for all tokens", False, "merged", flat=True),
    "ties": Arm("the merged difference without masks, for all tokens", True, "merged", flat=True),
    "kept": Arm("both experts kept whole, text by their mean", False, "mean"),
    "union": Arm("masks, text by the union of those of present experts", True, "union"),
    "merged": Arm("masks, text by the merged model", True, "merged"),
    "text_base": Arm("masks, text by the base", True, "base"),
    "mean": Arm("masks, text by the mean of present experts", True, "mean"),
}
METRICS = {
    **{f"single_{name}": f"right on questions of one modality: {arm.words}" for name, arm in ARMS.items()},
    **{f"double_{name}": f"right on questions that need both: {arm.words}" for name, arm in ARMS.items()},
    "retention": "single_union over single_kept, where each expert serves its own modality",
    "text": "right answers of the base on questions of text",
    "loss_glyph": "nats per answer in training, last tenth, of the expert of images",
    "loss_wave": "the same of the expert of sounds",
}


class ExpansionOptions(BaseModel):
    """Options of the benchmark."""

    model_config = ConfigDict(extra="forbid")

    base_steps: int = Field(600, ge=1, description="steps that the base learns text")
    connector_steps: int = Field(
        400, ge=1, description="steps that a connector learns alone, before the model"
    )
    expert_steps: int = Field(500, ge=1, description="steps that each expert learns its modality")
    batch: int = Field(64, ge=1, description="questions per step")
    base_lr: float = Field(2e-3, gt=0, description="learning rate of the base")
    connector_lr: float = Field(2e-3, gt=0, description="learning rate of the connectors alone")
    expert_lr: float = Field(1e-3, gt=0, description="learning rate of the experts")
    items: int = Field(80, ge=1, description="test questions of each template")


def expansion_benchmark(options: MmerOptions) -> Benchmark:
    """Return the benchmark of a merge by these options."""
    return Benchmark(
        "one base, an expert of images and one of sounds, merged: questions of one modality and of both",
        METRICS,
        lambda evaluation: _measure(evaluation, options),
        ExpansionOptions,
    )


def _measure(evaluation: Evaluation, options: MmerOptions) -> Measurement:
    asked: ExpansionOptions = evaluation.options
    console, tokenizer = evaluation.console, evaluation.tokenizer
    if hasattr(evaluation.model, "peft_config"):
        raise UserError("mmer:expansion trains whole models; name one without an adapter")
    for text in ["y", "n", "=", "?", ">", *(str(number) for number in range(1, 9))]:
        if len(tokenizer(text, add_special_tokens=False).input_ids) != 1:
            raise UserError(
                f"mmer:expansion asks with single tokens, and '{text}' is not one in this tokenizer"
            )
    draw = torch.Generator().manual_seed(evaluation.run.seed)
    how: dict[str, Any] = {"batch": asked.batch, "draw": draw, "console": console}
    base = copy.deepcopy(evaluation.model).float().requires_grad_(True)
    with torch.enable_grad():
        learn(base, tokenizer, TEXT, {}, steps=asked.base_steps, lr=asked.base_lr, label="train base", **how)
        losses, models, connectors = {}, {}, {}
        for kind in KINDS:
            model = copy.deepcopy(base).requires_grad_(False)
            with torch.random.fork_rng():
                torch.manual_seed(evaluation.run.seed)
                connector = CONNECTORS[kind](base.get_input_embeddings().weight.shape[1]).to(base.device)
            own: dict[Kind, torch.nn.Module] = {kind: connector}
            learned = (model, tokenizer, templates_of(kind), own)
            stage: dict[str, Any] = {
                "steps": asked.connector_steps,
                "lr": asked.connector_lr,
                "label": f"connect {kind}",
            }
            learn(*learned, **stage, **how)
            model.requires_grad_(True)
            # These stay the base's in the merge.
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.requires_grad_(False)
            stage = {"steps": asked.expert_steps, "lr": asked.expert_lr, "label": f"train {kind}"}
            losses[f"loss_{kind}"] = learn(*learned, **stage, **how)
            models[kind], connectors[kind] = model, connector.eval().requires_grad_(False)
    single = [t for kind in KINDS for t in templates_of(kind)]
    double: list[Any] = [(pair, sign) for pair in (KINDS, KINDS[::-1]) for sign in ("?", ">")]
    tests = {
        group: [draw_question(kinds, sign, draw) for kinds, sign in some for _ in range(asked.items)]
        for group, some in (("single", single), ("double", double), ("text", TEXT))
    }
    prompts = {
        group: [_prompt(q, connectors, base.device, draw) for q in some] for group, some in tests.items()
    }
    with tempfile.TemporaryDirectory() as place:
        experts = _experts(Path(place), base, models, tokenizer)
        masked = MaskedDeltas(Artefact.of(MmerMethod(options), experts))
        kept = KeptDeltas(experts)
    items: dict[str, Sequence[float | None]] = {}
    with console.bar(2 * len(ARMS) + 1, "answer", "set") as bar:
        for name, arm in ARMS.items():
            routed = _routed(base, masked if arm.masked else kept, arm)
            for group in ("single", "double"):
                right = _right(routed, tokenizer, tests[group], prompts[group], flat=arm.flat)
                items[f"{group}_{name}"] = right
                bar.update(1)
        plain = _routed(base, kept, ARMS["base"])
        items["text"] = _right(plain, tokenizer, tests["text"], prompts["text"], flat=True)
        bar.update(1)
    kept_right, union_right = (
        math.fsum(value or 0 for value in items[f"single_{name}"]) for name in ("kept", "union")
    )
    rows = [
        {"kinds": list(q.kinds), "numbers": list(q.numbers), "sign": q.sign, "answer": q.answer}
        for q in (*tests["single"], *tests["double"])
    ]
    return Measurement(
        items, {**losses, "retention": union_right / kept_right if kept_right else None}, rows=rows
    )


def _experts(folder: Path, base: Any, models: Mapping[Kind, Any], tokenizer: Any) -> Experts:
    """Write base and experts as checkpoints and open them as any others."""
    for name, model in {"base": base, **models}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    refs = {str(kind): str(folder / kind) for kind in models}
    experts = Experts(refs, CheckpointSource(str(folder / "base")), MergeOptions.model_validate({}))
    _ = experts.base_digest  # Read while the files are there.
    return experts


def _routed(base: Any, deltas: Deltas, arm: Arm) -> RoutedModel:
    return RoutedModel(copy.deepcopy(base), deltas, text_route=arm.text, materialize=True)


def _prompt(question: Question, connectors: Mapping[Kind, Any], device: Any, draw: torch.Generator) -> Prompt:
    parts: list[str | Media] = []
    for number, kind in zip(question.numbers, question.kinds, strict=True):
        if kind == "text":
            parts.append(str(number))
        else:
            parts.append(Media(kind, connectors[kind](RENDER[kind](number, draw)[None].to(device))[0]))
    return [*parts, question.sign]


def _right(
    routed: RoutedModel,
    tokenizer: Any,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    *,
    flat: bool,
) -> list[float]:
    """Return for every question whether the likeliest of its candidates is the answer (1 or 0)."""
    found: list[float] = []
    for start in range(0, len(questions), 64):
        part = slice(start, start + 64)
        batch = assemble(routed, tokenizer, prompts[part])
        inputs = batch.inputs()
        if flat:
            inputs["route_ids"] = torch.full_like(batch.route_ids, TEXT_ROUTE)
        logits = routed(**inputs).logits[:, -1]
        for question, row in zip(questions[part], logits, strict=True):
            options = question.candidates
            ids = token_ids(tokenizer, options)[:, 0].to(row.device)
            found.append(float(options[int(row[ids].argmax())] == question.answer))
    return found
