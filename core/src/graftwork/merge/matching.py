"""Which tensor of an expert belongs to which parameter of the base, and whether the two are one architecture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.errors import UserError, did_you_mean
from graftwork.merge.options import MergeOptions
from graftwork.merge.rows import DTYPES, Stored

_INSIDE = ("text_config", "llm_config", "language_config")
"""Where the config of a multimodal model holds that of its language model."""
_SAME = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
)
_BUFFERS = ("inv_freq", ".attn.bias", ".attn.masked_bias")
"""What old checkpoints store that is computed, not learned."""


@dataclass(frozen=True)
class Base:
    """The base as experts are compared with it.

    Attributes:
        config: as a mapping.
        shapes: of all parameters, by name, in the model's order.
        merged: names of those that are merged.
        embeddings: names of tables with a row per token.
        prefix: what the model's own class puts before the names inside its body, such as ``model.``.
        tensors: keys of the files.
        tied: whether the head is the embedding's table.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    merged: Sequence[str]
    embeddings: Sequence[str]
    prefix: str
    tensors: frozenset[str]
    tied: bool

    def tail(self, name: str) -> str:
        """Return the name inside the model's body."""
        return name.removeprefix(self.prefix)


@dataclass(frozen=True)
class Match:
    """The tensors of an expert by the base's names (those it lacks are not there), and what is to be told."""

    tensors: Mapping[str, Stored]
    notes: tuple[str, ...]


def match(expert: str, folder: Path, found: Mapping[str, Stored], base: Base, options: MergeOptions) -> Match:
    """Return which tensors of a checkpoint are the base's.

    Raises:
        UserError: another architecture, shape or vocabulary, tensors that are missing or left over, tensors of
            another type than float, or a language model that is not found or found twice.
    """
    _same_config(expert, folder, base)
    start = _prefix(expert, found, base, options.prefix.get(expert))
    tensors: dict[str, Stored] = {}
    for name in base.shapes:
        key = _key(name, start, found, base)
        if key is not None:
            tensors[name] = found[key]
    _complete(expert, found, tensors, base, options)
    _same_shapes(expert, tensors, base, options)
    for name in base.merged:
        if name in tensors and tensors[name].dtype not in DTYPES:
            raise UserError(
                f"expert '{expert}': tensor '{name}' is {tensors[name].dtype}; what is rounded already has no exact "
                f"difference to the base; name the model in float32, bfloat16 or float16"
            )
    used = set(tensors.values())
    others = [key for key, tensor in found.items() if tensor not in used]
    rest = [key for key in others if not key.endswith(_BUFFERS) and key not in base.tensors]
    head = base.tied and any(key.endswith("lm_head.weight") for key in rest)
    rest = [key for key in rest if not (head and key.endswith("lm_head.weight"))]
    if start != base.prefix:
        return Match(
            tensors,
            (
                f"expert '{expert}': its language model is '{start}'; {len(rest)} other tensors (such as encoder and "
                f"connector) are not merged and stay where they are",
            ),
        )
    if rest and options.extra == "error":
        raise UserError(
            f"expert '{expert}' has {len(rest)} tensors that the base lacks: {_listed(rest)}; set "
            f"transform.merge.extra=ignore to leave them out"
        )
    return Match(tensors, (f"expert '{expert}': {len(rest)} tensors are left out",) if rest else ())


def _same_config(expert: str, folder: Path, base: Base) -> None:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        inside = next((config[key] for key in _INSIDE if isinstance(config.get(key), dict)), None)
        mine = inside or config
        theirs, kind = base.config, str(mine.get("model_type", ""))
    except (OSError, ValueError, AttributeError):
        raise UserError(f"expert '{expert}': '{path}' is no config of a model") from None
    for key in _SAME:
        one, other = mine.get(key), theirs.get(key)
        # The name of a multimodal model holds that of its language model, as in llava_llama.
        alike = str(other) in kind if key == "model_type" else one == other
        if one is not None and other is not None and not alike:
            raise UserError(
                f"expert '{expert}' has another architecture than the base: its {key} is {one}, the base's {other}"
            )
    tied = mine.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if tied is not None and bool(tied) != base.tied:
        words = ("a head of its own", "a head that is tied to its embeddings")
        raise UserError(
            f"expert '{expert}' has {words[bool(tied)]} and the base {words[base.tied]}; write one as the other is "
            f"first"
        )


def _prefix(expert: str, found: Mapping[str, Stored], base: Base, named: str | None) -> str:
    """Return what stands before the names inside the model's body, in the expert's files."""
    inside = [name for name in base.merged if name.startswith(base.prefix)]
    first = base.tail(inside[0])
    if named is not None:
        candidates = [named + base.prefix, named]
        starts = [one for one in candidates if one + first in found]
        if not starts:
            raise UserError(
                f"expert '{expert}' has no tensor '{candidates[0]}{first}', which transform.merge.prefix "
                f"asks for{did_you_mean(candidates[0] + first, found)}"
            )
        return starts[0]
    ends = [key for key in found if key == first or key.endswith(f".{first}")]
    counts = {key.removesuffix(first): 0 for key in ends}
    for start in counts:
        names = {name: start + base.tail(name) for name in inside}
        counts[start] = sum(
            key in found and found[key].shape == base.shapes[name] for name, key in names.items()
        )
    if not counts:
        raise UserError(
            f"expert '{expert}' lacks the tensor '{inside[0]}'{did_you_mean(inside[0], found)} that the base has; if "
            f"it holds a language model under another name, set transform.merge.prefix.{expert}"
        )
    best = [start for start, count in counts.items() if count == max(counts.values())]
    if base.prefix in best:
        return base.prefix
    if len(best) > 1:
        raise UserError(
            f"expert '{expert}' holds {len(best)} models like the base: {_listed(best)}; name one with "
            f"transform.merge.prefix.{expert}"
        )
    return best[0]


def _key(name: str, start: str, found: Mapping[str, Stored], base: Base) -> str | None:
    if name.startswith(base.prefix):
        keys = [start + base.tail(name)]
    else:
        # The head stands beside the body: under the same name, or outside of everything.
        keys = [start.removesuffix(base.prefix) + name, start + name, name]
    return next((key for key in keys if key in found), None)


def _complete(
    expert: str,
    found: Mapping[str, Stored],
    tensors: Mapping[str, Stored],
    base: Base,
    options: MergeOptions,
) -> None:
    missing = [name for name in base.merged if name not in tensors]
    if missing and options.missing == "error":
        raise UserError(
            f"expert '{expert}' lacks {len(missing)} tensors that the base has: {_listed(missing)}"
            f"{did_you_mean(missing[0], found)}; set transform.merge.missing=base to take the base's"
        )


def _same_shapes(expert: str, tensors: Mapping[str, Stored], base: Base, options: MergeOptions) -> None:
    for name in (*base.merged, *base.embeddings):
        if name not in tensors or tensors[name].shape == base.shapes[name]:
            continue
        mine, theirs = tensors[name].shape, base.shapes[name]
        if name in base.embeddings and mine[1:] == theirs[1:]:
            if options.vocab == "crop" and mine[0] > theirs[0]:
                continue
            cure = "; set transform.merge.vocab=crop to take the base's only" if mine[0] > theirs[0] else ""
            raise UserError(
                f"expert '{expert}' has another vocabulary than the base: {mine[0]} tokens, the base {theirs[0]}{cure}"
            )
        raise UserError(
            f"expert '{expert}': tensor '{name}' has shape {mine}, and the base's has {theirs}; experts are made from "
            f"the same base"
        )


def _listed(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
