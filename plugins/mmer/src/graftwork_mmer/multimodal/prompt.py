"""Prompts of text and media, as embeddings with a route for every token."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graftwork import UserError

from graftwork_mmer.routed.model import RoutedModel
from graftwork_mmer.routed.plan import TEXT, expert_index


@dataclass(frozen=True)
class Media:
    """Soft tokens (tokens x h) that the connector of ``expert`` made."""

    expert: str
    tokens: torch.Tensor


Prompt = Sequence[str | Media]


@dataclass(frozen=True)
class Assembled:
    """A batch for :class:`RoutedModel`, padded on the left.

    Attributes:
        inputs_embeds: B x T x h.
        attention_mask, position_ids, route_ids: B x T.
        present: of each row, the experts that its text follows.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    route_ids: torch.Tensor
    present: list[set[str]]

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of a call."""
        return {
            "inputs_embeds": self.inputs_embeds,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "route_ids": self.route_ids,
            "present": self.present,
        }


def assemble(
    routed: RoutedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    tasks: Sequence[Collection[str]] | None = None,
) -> Assembled:
    """Return prompts as one batch; each is a sequence of texts and media in their order.

    Text is embedded by the weights that it will be computed with. What the tokenizer puts in front of a text (such as
    a beginning token) comes first, once.

    Args:
        routed: the model.
        tokenizer: of its text.
        prompts: texts and media.
        tasks: of each prompt, further experts that its text follows, such as one that was trained on text alone.

    Raises:
        UserError: media of an expert that the model does not have, or of another width, or an empty prompt.
    """
    device, experts = routed.model.device, routed.experts
    width = routed.model.get_input_embeddings().weight.shape[1]
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    present: list[set[str]] = []
    for number, prompt in enumerate(prompts):
        some = {part.expert for part in prompt if isinstance(part, Media)}
        some |= set(tasks[number]) if tasks is not None else set()
        parts: list[torch.Tensor] = []
        routes: list[torch.Tensor] = []
        text = tokenizer("").input_ids  # What stands before any text.
        for part in [*prompt, None]:
            if isinstance(part, str):
                text = text + tokenizer(part, add_special_tokens=False).input_ids
                continue
            if text:
                ids = torch.tensor([text], device=device)
                parts.append(routed.embed(ids, [some])[0])
                routes.append(torch.full((len(text),), TEXT, device=device))
                text = []
            if part is None:
                break
            route = expert_index(part.expert, experts) + 1
            if part.tokens.ndim != 2 or part.tokens.shape[1] != width:
                raise UserError(
                    f"media of '{part.expert}' are {tuple(part.tokens.shape)}, and the model reads tokens x {width}"
                )
            parts.append(part.tokens.to(device, parts[0].dtype if parts else routed.model.dtype))
            routes.append(torch.full((len(part.tokens),), route, device=device))
        if not parts:
            raise UserError(f"prompt {number + 1} is empty")
        rows.append((torch.cat(parts), torch.cat(routes)))
        present.append(some)
    longest = max(len(own) for _, own in rows)
    embeds = rows[0][0].new_zeros(len(rows), longest, width)
    route_ids = torch.full((len(rows), longest), TEXT, device=device)
    mask = torch.zeros_like(route_ids)
    for row, (values, own) in enumerate(rows):
        start = longest - len(own)
        embeds[row, start:] = values
        route_ids[row, start:] = own
        mask[row, start:] = 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return Assembled(embeds, mask, positions, route_ids, present)
