"""Learning block by block: a layer's rounded output shall be what the unchanged model's layer gives (FlatQuant)."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from graftwork import UserError
from graftwork.distributed import rank_and_world
from graftwork.transform.block import Block
from graftwork.transform.kv import kv_attention
from graftwork.transform.scheme import KVScheme

from graftwork_bdq.layer import LayerTransform

LAST_RATE = 1e-3
"""The cosine ends at this share of the learning rate."""

Batch = tuple[torch.Tensor, dict[str, Any], torch.Tensor]


def train_block(block: Block, layer: LayerTransform, kv: KVScheme) -> tuple[float, float, bool]:
    """Learn the parameters of ``layer`` on the calibration batches.

    Returns the block's loss before and after, and whether learning had raised it.

    The loss of a batch is ``||block_q(x) - block(x)||^2``, divided by its own value so that its size does not matter.
    The losses that are returned are sums over all batches, relative to the sum of ``||block(x)||^2``. If learning has
    raised it, the start is taken again, so the loss after is never larger than that before.

    Raises:
        UserError: several processes, or a loss that is no number, with the block and the step.
    """
    options = layer.options
    check_alone()

    def batches() -> Iterator[Batch]:
        if not options.propagate:
            yield from block.dense_batches()
            return
        for (hidden, kwargs), (_, _, target) in zip(block.batches(), block.dense_batches(), strict=True):
            yield hidden, kwargs, target

    def difference(batch: Batch) -> torch.Tensor:
        hidden, kwargs, target = batch
        return (block.run(hidden, kwargs).float() - target.float()).square()

    def whole() -> float:
        with torch.no_grad():
            wrong = math.fsum(float(difference(batch).double().sum()) for batch in batches())
        size = math.fsum(float(target.double().square().sum()) for _, _, target in batches())
        return wrong / size if size else wrong

    count = sum(1 for _ in batches())
    steps = options.steps or options.epochs * count
    with layer.student(), rounded_cache(block.module, kv):
        before = whole()
        start = copy.deepcopy(layer.state_dict())
        optimizer, schedule = optimizer_for(layer.groups(), steps)
        for step, batch in zip(range(steps), forever(batches), strict=False):
            loss = difference(batch).mean()
            if not math.isfinite(loss.item()):
                raise UserError(
                    f"'{block.name}': the loss is {loss.item()} at step {step + 1}; lower plugins.bdq.lr"
                )
            optimizer.zero_grad()
            (loss / loss.detach().clamp_min(torch.finfo(loss.dtype).tiny)).backward()
            optimizer.step()
            schedule.step()
            layer.forget()
        after = whole()
        raised = not after <= before
        if raised:
            layer.load_state_dict(start)
    return before, before if raised else after, raised


def check_alone() -> None:
    """Refuse to learn in several processes, each of which would learn something else.

    Raises:
        UserError: there are several.
    """
    _, world = rank_and_world()
    if world > 1:
        raise UserError(f"plugins.bdq.learn works in one process and this run has {world}; set it to none")


def optimizer_for(
    groups: list[dict[str, Any]], steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW without weight decay, and a cosine from the groups' rates to a thousandth of each."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def factor(step: int) -> float:
        return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * min(step / steps, 1))) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def forever(batches: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Yield the batches again and again, in their order."""
    return itertools.chain.from_iterable(batches() for _ in itertools.count())


@contextlib.contextmanager
def rounded_cache(layer: torch.nn.Module, kv: KVScheme) -> Iterator[None]:
    """Let the attention inside ``layer`` round keys and values meanwhile."""
    if not kv.rounds:
        yield
        return
    configs = {id(m.config): m.config for m in layer.modules() if hasattr(m, "config")}
    kept = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = kv_attention(kv, config._attn_implementation)
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = kept[key]
