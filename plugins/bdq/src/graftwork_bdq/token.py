"""Learning end to end: all scales, rotations and clip factors at once, from a loss on tokens (the paper's way)."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from graftwork import UserError
from graftwork.transform.scheme import KVScheme
from graftwork.transform.structure import find_layers, places
from graftwork.transform.whole import Whole
from torch.nn import functional as F

from graftwork_bdq.block import check_alone, forever, optimizer_for, rounded_cache
from graftwork_bdq.layer import LayerTransform
from graftwork_bdq.loss import RceLoss
from graftwork_bdq.options import BdqOptions
from graftwork_bdq.statistics import Gatherer


def learn_tokens(whole: Whole, options: BdqOptions, kv: KVScheme) -> dict[str, torch.Tensor]:
    """Learn the parameters of all layers and return them as ``LAYER.NAME``, with the seed of each layer's rotations.

    Each window predicts its tokens from those before. Weights are rounded to nearest meanwhile; where they are rounded
    with error feedback afterwards, they are left as they are (SpinQuant's rule). ``loss.first`` and ``loss.last`` are
    the mean losses over all windows before and after; if learning has raised it, the start is taken again.

    Raises:
        UserError: several processes, or a loss that is no number, with the step.
    """
    check_alone()
    model = whole.model
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    try:
        layers = start_layers(whole, options)
        first, last = _train(whole, options, kv, list(layers.values()))
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
    found = {
        f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.tensors().items()
    }
    seeds = {f"{name}.seed": torch.tensor(layer.seed) for name, layer in layers.items()}
    return {**found, **seeds, "loss.first": torch.tensor(first), "loss.last": torch.tensor(last)}


def start_layers(whole: Whole, options: BdqOptions) -> dict[str, LayerTransform]:
    """Return every layer's transform before learning, by the layer's name; the scales from the whole model's inputs."""
    model = whole.model
    prefix, layers = find_layers(model)
    gatherers = [Gatherer(options.exclude_first_token) for _ in layers]
    if options.start != "identity":
        with contextlib.ExitStack() as stack, torch.no_grad():
            for number, (layer, gatherer) in enumerate(zip(layers, gatherers, strict=True)):
                found = places(layer, model.config)
                stack.enter_context(gatherer.watching(layer, found, f"{prefix}.{number}"))
            for ids in whole.windows.split(whole.batch_size):
                model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
    return {
        f"{prefix}.{number}": LayerTransform(
            layer,
            model.config,
            options,
            gatherer.result(),
            whole.seed * 1_000_003 + number,
            rounds=options.quantizer == "rtn",
        )
        for number, (layer, gatherer) in enumerate(zip(layers, gatherers, strict=True))
    }


def _train(
    whole: Whole, options: BdqOptions, kv: KVScheme, layers: Sequence[LayerTransform]
) -> tuple[float, float]:
    model = whole.model
    rce = RceLoss(options.delta, options.sign)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits[:, :-1]

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        teacher = None
        if options.q == "teacher":
            with torch.no_grad(), _inactive(layers):
                teacher = logits(ids).flatten(0, 1)
        with rounded_cache(model, kv):
            predicted, labels = logits(ids).flatten(0, 1), ids[:, 1:].flatten()
        if options.token_loss == "rce":
            return rce(predicted, labels, teacher)
        if teacher is not None:
            return F.cross_entropy(predicted.float(), teacher.float().softmax(-1))
        return F.cross_entropy(predicted.float(), labels)

    def batches() -> Iterator[torch.Tensor]:
        return (ids.to(model.device) for ids in whole.windows.split(whole.batch_size))

    def mean() -> float:
        with torch.no_grad():
            total = math.fsum(loss_of(ids).item() * len(ids) for ids in batches())
        return total / len(whole.windows)

    steps = options.steps or options.epochs * math.ceil(len(whole.windows) / whole.batch_size)
    groups: list[dict[str, Any]] = [group for layer in layers for group in layer.groups()]
    optimizer, schedule = optimizer_for(groups, steps)
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.student())
        first = mean()
        start = [copy.deepcopy(layer.state_dict()) for layer in layers]
        bar = stack.enter_context(whole.console.bar(steps, "learn scales", "step"))
        for step, ids in zip(range(steps), forever(batches), strict=False):
            loss = loss_of(ids)
            if not math.isfinite(loss.item()):
                raise UserError(
                    f"learn: token: the loss is {loss.item()} at step {step + 1}; lower plugins.bdq.lr"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            for layer in layers:
                layer.forget()
            bar.update(1)
        last = mean()
        if not last <= first:
            for layer, state in zip(layers, start, strict=True):
                layer.load_state_dict(state)
            last = first
        return first, last


@contextlib.contextmanager
def _inactive(layers: Sequence[LayerTransform]) -> Iterator[None]:
    """Let all layers compute what the unchanged model does meanwhile."""
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True
