"""Which weights each token is computed with.

Route ids: 0 is text, ``i + 1`` is expert i of the sorted names. A text token follows its row's *present* experts by
one of four policies; tokens of the same weights have the same key.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from graftwork import UserError
from graftwork.errors import did_you_mean

TextRoute = Literal["union", "merged", "base", "mean"]
TEXT = 0


@dataclass(frozen=True)
class Key:
    """Weights: of one expert (``kind`` "expert"), or those of a text policy with these experts present (sorted)."""

    kind: Literal["expert", "union", "merged", "base", "mean"]
    experts: tuple[int, ...] = ()


BASE = Key("base")


@dataclass(frozen=True)
class Plan:
    """The keys of a batch: ``tokens`` (B x T) and ``text`` (B, for embeddings and head) are places in ``keys``."""

    keys: tuple[Key, ...]
    tokens: torch.Tensor
    text: torch.Tensor


def text_key(policy: TextRoute, present: Collection[int]) -> Key:
    """Return the weights of text tokens where some experts are present.

    With one expert present ``union`` and ``mean`` are that expert's weights; with none they are the base's.
    """
    some = tuple(sorted(set(present)))
    if policy == "merged":
        return Key("merged")
    if policy == "base" or not some:
        return BASE
    return Key("expert", some) if len(some) == 1 else Key(policy, some)


def make_plan(routes: torch.Tensor, present: Sequence[Collection[int]], policy: TextRoute) -> Plan:
    """Return the plan of a batch.

    Args:
        routes: B x T, route ids.
        present: of each row, the experts that text tokens follow.
        policy: of text tokens.
    """
    keys: dict[Key, int] = {}
    tokens = torch.empty_like(routes)
    text = torch.empty(len(routes), dtype=routes.dtype, device=routes.device)
    for row, some in enumerate(present):
        own = keys.setdefault(text_key(policy, some), len(keys))
        text[row] = own
        tokens[row] = own
        for route in routes[row].unique().tolist():
            if route != TEXT:
                place = keys.setdefault(Key("expert", (route - 1,)), len(keys))
                tokens[row].masked_fill_(routes[row] == route, place)
    return Plan(tuple(keys), tokens, text)


def check_routes(routes: torch.Tensor, shape: tuple[int, int], experts: Sequence[str]) -> None:
    """Refuse route ids of another shape than the tokens, or that are no route.

    Raises:
        ValueError: either.
    """
    if tuple(routes.shape) != shape:
        raise ValueError(f"route_ids are {tuple(routes.shape)}, and the tokens are {shape}: one id per token")
    if routes.is_floating_point() or routes.dtype == torch.bool:
        raise ValueError(f"route_ids are whole numbers, not {routes.dtype}")
    if routes.numel() and not 0 <= int(routes.min()) <= int(routes.max()) <= len(experts):
        raise ValueError(
            f"route_ids go from 0 (text) to {len(experts)} ({', '.join(experts)}), not from {int(routes.min())} to "
            f"{int(routes.max())}"
        )


def expert_index(name: str, experts: Sequence[str]) -> int:
    """Return the place of an expert.

    Raises:
        UserError: there is none of that name.
    """
    if name not in experts:
        raise UserError(
            f"there is no route '{name}'{did_you_mean(name, experts)}; routes are {', '.join(experts)}"
        )
    return list(experts).index(name)
