"""The data set of an iteration: pairs of answers, where each came from, and what the players say to them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from graftwork.errors import PluginError, UserError
from graftwork.hookspecs import Sample, SelfPlay
from graftwork.self_play.items import Item
from graftwork.self_play.tables import write_table
from graftwork.self_play.writing import Round

PAIRS = {
    "item": pa.int64(),
    "round": pa.int32(),
    "player": pa.string(),
    "checkpoint": pa.string(),
    "seed": pa.int64(),
    "prompt_ids": pa.list_(pa.int32()),
    "chosen_ids": pa.list_(pa.int32()),
    "rejected_ids": pa.list_(pa.int32()),
    "reference_chosen": pa.list_(pa.float32()),
    "reference_rejected": pa.list_(pa.float32()),
}
"""Columns of ``pairs.parquet``; the references are by player, the newest first."""


@dataclass(frozen=True)
class Pair:
    """Two answers to the prompt of ``item``; ``round`` is the index of the player that wrote, None for no one."""

    item: Item
    round: Round | None
    seed: int | None
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def pair_up(
    items: Sequence[Item], rounds: Sequence[Round], play: SelfPlay, owner: str, max_length: int | None
) -> tuple[list[Pair], list[str]]:
    """Return the pairs of ``rounds`` (the targets alone where nothing was written), and notes for the user.

    Raises:
        UserError: no pair is left to learn from.
        PluginError: the plugin's choice failed.
    """
    if not rounds:
        return [Pair(item, None, None, tuple(item.target_ids), ()) for item in items], []
    by_index = {item.index: item for item in items}
    pairs: list[Pair] = []
    cut = same = 0
    for one in rounds:
        whose = f"the answers of {one.player.name}"
        rows = zip(one.samples, one.seeds, strict=True)
        for index, group in itertools.groupby(rows, key=lambda row: row[0].item):
            item, members = by_index[index], list(group)
            samples = [_fitted(sample, item, max_length) for sample, _ in members]
            kept = [sample for sample in samples if sample.ended or play.options.truncated == "keep"]
            cut += len(samples) - len(kept)
            try:
                found = _choose(play, item, kept)
            except UserError:
                raise
            except Exception as error:
                raise PluginError(owner, "self_play (choose)", error) from error
            for chosen, rejected in found:
                if not chosen or not rejected:
                    raise UserError(
                        f"training item {index}: {whose} hold one without a token, so no pair is made"
                    )
                if tuple(chosen) == tuple(rejected):
                    same += 1
                    if play.options.identical == "drop":
                        continue
                pairs.append(Pair(item, one, members[0][1], tuple(chosen), tuple(rejected)))
    if not pairs:
        raise UserError(
            "no pair is left to learn from: every written answer was cut at writing.max_new_tokens, is the target "
            "itself, or was not chosen; let answers be longer, or look at rounds/*/samples.parquet"
        )
    notes = []
    if cut:
        notes.append(f"{cut} answers cut at writing.max_new_tokens are left out")
    if same:
        if play.options.identical == "drop":
            notes.append(f"{same} of {same + len(pairs)} pairs were two equal answers, and are left out")
        else:
            notes.append(
                f"{same} of {len(pairs)} pairs are two equal answers, from which nothing is learned; "
                f"identical: drop leaves them out"
            )
    return pairs, notes


def save_pairs(path: Path, pairs: Sequence[Pair], chosen: Any, rejected: Any) -> None:
    """Write the data set with the players' log-probabilities (tensors N x J)."""
    write_table(
        path,
        {
            "item": [pair.item.index for pair in pairs],
            "round": [pair.round.player.index if pair.round else None for pair in pairs],
            "player": [pair.round.player.name if pair.round else None for pair in pairs],
            "checkpoint": [pair.round.player.checkpoint if pair.round else None for pair in pairs],
            "seed": [pair.seed for pair in pairs],
            "prompt_ids": [pair.item.prompt_ids for pair in pairs],
            "chosen_ids": [list(pair.chosen) for pair in pairs],
            "rejected_ids": [list(pair.rejected) for pair in pairs],
            "reference_chosen": chosen.tolist(),
            "reference_rejected": rejected.tolist(),
        },
        PAIRS,
    )


def load_pairs(path: Path) -> Dataset:
    """Return the data set that :func:`save_pairs` wrote."""
    return Dataset(pq.read_table(path))


def _choose(
    play: SelfPlay, item: Item, samples: Sequence[Sample]
) -> Sequence[tuple[Sequence[int], Sequence[int]]]:
    if play.choose is None:
        return [(item.target_ids, sample.tokens) for sample in samples]
    return play.choose(item.target_ids, samples) if samples else []


def _fitted(sample: Sample, item: Item, max_length: int | None) -> Sample:
    """Cut an answer that with its prompt is longer than the trainer takes."""
    if max_length is None or len(item.prompt_ids) + len(sample.tokens) <= max_length:
        return sample
    tokens = list(sample.tokens)[: max_length - len(item.prompt_ids)]
    return Sample(sample.item, sample.prompt, sample.target, sample.text, tokens, False, sample.score)
