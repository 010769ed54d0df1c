"""A round: what one player answers to every prompt, scored, and kept with where it came from."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from graftwork.distributed import barrier
from graftwork.errors import PluginError, UserError
from graftwork.generate.decoding import Decoding
from graftwork.generate.prompts import Prompt
from graftwork.generate.session import POOL, generate
from graftwork.hookspecs import Sample, SelfPlay
from graftwork.self_play.items import Item
from graftwork.self_play.options import WritingOptions
from graftwork.self_play.parts import in_parts
from graftwork.self_play.players import Player
from graftwork.self_play.tables import write_table

if TYPE_CHECKING:
    from graftwork.run import Run

SAMPLES = {
    "item": pa.int64(),
    "sample": pa.int32(),
    "player": pa.string(),
    "checkpoint": pa.string(),
    "seed": pa.int64(),
    "finish": pa.string(),
    "prompt": pa.string(),
    "target": pa.string(),
    "text": pa.string(),
    "score": pa.float64(),
    "prompt_ids": pa.list_(pa.int32()),
    "generated_ids": pa.list_(pa.int32()),
}
"""Columns of ``samples.parquet``. ``finish``: ``end`` where the answer ended by itself, else ``length``."""


class Writer(Protocol):
    """Writes an answer to every item; what it draws depends on ``seed`` and the items alone."""

    def __call__(
        self, model: Any, items: Sequence[Item], seed: int, progress: Callable[[int], Any]
    ) -> list[tuple[list[int], str]]:
        """Return tokens (the end token included where one was written) and text of each answer."""
        ...


@dataclasses.dataclass(frozen=True)
class BatchedWriter:
    """Writes with ``generate`` in this process, with whatever plugins bring to generation."""

    run: Run
    tokenizer: Any
    options: WritingOptions

    def __call__(
        self, model: Any, items: Sequence[Item], seed: int, progress: Callable[[int], Any]
    ) -> list[tuple[list[int], str]]:
        options = self.options
        sampling: dict[str, Any] = {"do_sample": options.temperature > 0}
        if options.temperature > 0:
            # Without top_k=0 a checkpoint's own generation config would cut the distribution.
            sampling |= {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        answers = generate(
            model,
            self.tokenizer,
            [asked(item.prompt, options.template) for item in items],
            decoding=Decoding.from_plugins(self.run, model),
            batch_size=options.batch_size,
            seed=seed,
            names=[f"training item {item.index}" for item in items],
            progress=progress,
            max_new_tokens=options.max_new_tokens,
            **sampling,
        )
        return [(answer.tokens, answer.text) for answer in answers]


def asked(prompt: Any, template: str | None) -> Prompt:
    """Return the prompt as a player gets it: the data's form, or its text put into ``template``."""
    if template is None:
        return Prompt(prompt)
    return Prompt(template.replace("{prompt}", _text(prompt)))


def _text(prompt: Any) -> str:
    """Return the text of a prompt: its own, or that of its messages."""
    return prompt if isinstance(prompt, str) else "\n\n".join(str(message["content"]) for message in prompt)


@dataclasses.dataclass(frozen=True)
class Round:
    """The answers of one player, in the order of the items; several in a row where it wrote several a prompt."""

    player: Player
    samples: Sequence[Sample]
    seeds: Sequence[int]


def write_round(
    folder: Path,
    run: Run,
    play: SelfPlay,
    player: Player,
    items: Sequence[Item],
    *,
    writer: Writer,
    seat: Callable[[], Any],
    ends: set[int],
) -> Round:
    """Return the round of ``player``, read from ``folder`` where it is there, else written now, part by part.

    ``seat`` puts the player in place and returns the model. ``ends`` are the tokens that end an answer.
    """
    path = folder / "samples.parquet"
    size = POOL * play.options.writing.batch_size
    # An item's several answers stand side by side, in the same part.
    asked_for = [item for item in items for _ in range(play.samples)]
    seeds = [part_seed(run.seed, player.index, number) for number in range(-(-len(asked_for) // size))]
    if not path.exists():
        model = seat()
        with run.console.bar(len(asked_for), f"{player.name} writes") as bar:

            def write(number: int) -> list[Any]:
                some = asked_for[number * size : (number + 1) * size]
                return [list(one) for one in writer(model, some, seeds[number], bar.update)]

            answers = in_parts(folder / "written", len(seeds), write)
        samples = [
            Sample(item.index, item.prompt, item.target, text, tokens, bool(tokens) and tokens[-1] in ends)
            for item, (tokens, text) in zip(asked_for, answers, strict=True)
        ]
        samples = _scored(folder / "scored", run, play, player, samples, size)
        if run.main:
            _save(path, player, items, samples, [seeds[k // size] for k in range(len(samples))])
        barrier()
    if run.main:
        # Also where it was cut off between the round and this.
        for phase in ("written", "scored"):
            shutil.rmtree(folder / phase, ignore_errors=True)
    return _load(path, player, items)


def part_seed(seed: int, player: int, part: int) -> int:
    """Return the seed that a part of a round is drawn with."""
    digest = hashlib.sha256(f"{seed}:{player}:{part}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _scored(
    folder: Path, run: Run, play: SelfPlay, player: Player, samples: list[Sample], size: int
) -> list[Sample]:
    if play.score is None:
        return samples
    score = play.score
    owner = run.plugins.implements("self_play")[0]
    # All answers to one prompt stay together.
    size = max(1, size // play.samples) * play.samples
    with run.console.bar(len(samples), f"score {player.name}") as bar:

        def rate(number: int) -> list[float]:
            some = samples[number * size : (number + 1) * size]
            try:
                found = [float(value) for value in score(some)]
            except UserError:
                raise
            except Exception as error:
                raise PluginError(owner, "self_play (score)", error) from error
            bar.update(len(some))
            return found

        values = in_parts(folder, -(-len(samples) // size), rate)
    return [dataclasses.replace(sample, score=value) for sample, value in zip(samples, values, strict=True)]


def _save(
    path: Path, player: Player, items: Sequence[Item], samples: Sequence[Sample], seeds: Sequence[int]
) -> None:
    prompts = {item.index: item for item in items}
    numbers: dict[int, int] = {}
    rows: dict[str, list[Any]] = {name: [] for name in SAMPLES}
    for sample, seed in zip(samples, seeds, strict=True):
        number = numbers.get(sample.item, 0)
        numbers[sample.item] = number + 1
        values = {
            "item": sample.item,
            "sample": number,
            "player": player.name,
            "checkpoint": player.checkpoint,
            "seed": seed,
            "finish": "end" if sample.ended else "length",
            "prompt": _text(sample.prompt),
            "target": sample.target,
            "text": sample.text,
            "score": sample.score,
            "prompt_ids": prompts[sample.item].prompt_ids,
            "generated_ids": list(sample.tokens),
        }
        for name, value in values.items():
            rows[name].append(value)
    write_table(path, rows, SAMPLES)


def _load(path: Path, player: Player, items: Sequence[Item]) -> Round:
    columns = pq.read_table(path).to_pydict()
    prompts = {item.index: item for item in items}
    samples = [
        Sample(item, prompts[item].prompt, prompts[item].target, text, tokens, finish == "end", score)
        for item, text, tokens, finish, score in zip(
            columns["item"],
            columns["text"],
            columns["generated_ids"],
            columns["finish"],
            columns["score"],
            strict=True,
        )
    ]
    return Round(player, samples, columns["seed"])
