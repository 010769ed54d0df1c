"""Answer many prompts: batches of like length, answers in the order of the prompts, a way to go on later."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from graftwork.errors import UserError
from graftwork.generate.decoding import Decoding, Encoded, decode_tokens, encode
from graftwork.generate.paired import Rows
from graftwork.generate.passes import inner_model
from graftwork.generate.prompts import Prompt
from graftwork.generate.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

POOL = 8
"""So many batches are sorted by length together. A larger pool pads less and gives answers in later lumps."""


@dataclass(frozen=True)
class Answer:
    """The answer to the prompt number ``index`` (from 0): its text without outer blanks, and all its new tokens,
    the end token included."""

    index: int
    text: str
    tokens: list[int]


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt | str],
    *,
    decoding: Decoding | None = None,
    batch_size: int = 8,
    seed: int = 42,
    begin: int = 0,
    rows: Rows = "joint",
    max_prompt_tokens: int | None = None,
    names: Sequence[str] | None = None,
    streamer: Any = None,
    trace: Trace | None = None,
    progress: Callable[[int], Any] | None = None,
    **options: Any,
) -> Iterator[Answer]:
    """Yield the answers to ``prompts``, in their order, from number ``begin`` on.

    Every prompt is checked before the first is answered, and ``names`` (``prompt 1``, ... where not given) are
    what a message calls them. ``options`` are those of transformers' ``generate``; without ``do_sample`` answers
    are greedy. Batches are made of all prompts, whatever ``begin`` is, and each draws from a seed of its own:
    the same prompts, seed, batch size and options give the same answers in one go or in several. With another
    batch size samples differ. The global random state is left alone.

    ``trace`` takes the steps of the answers in order; it is filled when the last answer is out.
    ``rows``, ``max_prompt_tokens``, ``streamer``: see :func:`graftwork.generate.decode`.

    Raises:
        UserError: what :func:`graftwork.generate.decode` refuses; several prompts with a streamer; more than
            one answer a prompt.
    """
    pairs = [Prompt(one) if isinstance(one, str) else one for one in prompts]
    if streamer is not None and len(pairs) > 1:
        raise UserError(f"{len(pairs)} prompts cannot be streamed; give one, or no streamer")
    several = options.get("num_return_sequences") or 1
    if several > 1:
        raise UserError(
            f"num_return_sequences={several}: a prompt gets one answer; repeat the prompt instead"
        )
    options = {"do_sample": False, **options}
    encoded = encode(
        model,
        pairs,
        tokenizer=tokenizer,
        decoding=decoding,
        max_prompt_tokens=max_prompt_tokens,
        names=names,
        options=options,
    )

    def answer(batch: Sequence[int]) -> tuple[dict[int, list[int]], Trace | None]:
        steps = None if trace is None else Trace(trace.top)
        with _seeded(seed, batch, model):
            found = decode_tokens(
                model,
                [encoded[index] for index in batch],
                tokenizer=tokenizer,
                decoding=decoding,
                rows=rows,
                streamer=streamer,
                trace=steps,
                **options,
            )
        if progress is not None:
            progress(len(batch))
        return dict(zip(batch, found, strict=True)), steps

    return _answers(tokenizer, batches(encoded, batch_size), begin, answer, trace)


def batches(encoded: Sequence[Encoded], batch_size: int) -> list[list[list[int]]]:
    """Return pools of batches of indices: a pool holds neighbours, its batches prompts of like length."""
    size = batch_size * POOL if batch_size > 1 else 1
    pools = []
    for start in range(0, len(encoded), size):
        pool = list(range(start, min(start + size, len(encoded))))
        pool.sort(key=lambda index: -len(encoded[index].main))
        pools.append([pool[first : first + batch_size] for first in range(0, len(pool), batch_size)])
    return pools


def _answers(
    tokenizer: Any,
    pools: Sequence[Sequence[Sequence[int]]],
    begin: int,
    answer: Callable[[Sequence[int]], tuple[dict[int, list[int]], Trace | None]],
    trace: Trace | None,
) -> Iterator[Answer]:
    following = begin
    for pool in pools:
        ready: dict[int, list[int]] = {}
        steps: dict[int, Any] = {}
        for batch in pool:
            if max(batch) < begin:
                continue
            found, traced = answer(batch)
            ready.update(found)
            if traced is not None:
                steps.update(zip(batch, traced.rows, strict=True))
            while following in ready:
                tokens = ready.pop(following)
                if trace is not None:
                    trace.rows.append(steps.pop(following))
                yield Answer(following, tokenizer.decode(tokens, skip_special_tokens=True).strip(), tokens)
                following += 1


class _seeded:
    """Draw from a seed made of the run's and of the batch; put the random state back afterwards."""

    def __init__(self, seed: int, batch: Sequence[int], model: Any) -> None:
        digest = hashlib.sha256(f"{seed}:{','.join(map(str, batch))}".encode()).digest()
        self.seed = int.from_bytes(digest[:8], "big") >> 1
        device = inner_model(model).device
        # The CPU's own state is always kept.
        others = [] if device.type == "cpu" else [device]
        self.fork = torch.random.fork_rng(devices=others, device_type=device.type if others else "cuda")

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *problem: Any) -> None:
        self.fork.__exit__(*problem)
