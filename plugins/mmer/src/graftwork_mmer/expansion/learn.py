"""Train the base on text and an expert per modality on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from graftwork.console import Console
from torch import nn
from torch.nn.functional import cross_entropy

from graftwork_mmer.expansion.data import RENDER, Kind, Question, draw_question

Template = tuple[tuple[Kind, ...], str]
TEXT: list[Template] = [(("text",), "="), (("text", "text"), "?"), (("text", "text"), ">")]


def templates_of(kind: Kind) -> list[Template]:
    """Return what an expert learns: to name its numbers, and to compare them with written ones, both ways round."""
    pairs: list[tuple[Kind, ...]] = [(kind, "text"), ("text", kind)]
    return [((kind,), "="), *((pair, sign) for pair in pairs for sign in ("?", ">"))]


def inputs_of(
    model: Any,
    tokenizer: Any,
    connectors: Mapping[Kind, nn.Module],
    questions: Sequence[Question],
    draw: torch.Generator,
) -> torch.Tensor:
    """Return the embeddings (B x T x h) of questions of one template."""
    embed, device = model.get_input_embeddings(), model.device
    parts = []
    for place, kind in enumerate(questions[0].kinds):
        numbers = [question.numbers[place] for question in questions]
        if kind == "text":
            parts.append(embed(token_ids(tokenizer, [str(number) for number in numbers]).to(device)))
        else:
            shown = torch.stack([RENDER[kind](number, draw) for number in numbers])
            parts.append(connectors[kind](shown.to(device)))
    parts.append(embed(token_ids(tokenizer, [question.sign for question in questions]).to(device)))
    return torch.cat(parts, 1)


def token_ids(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Return the one token of each text (B x 1)."""
    return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids for text in texts])


def learn(
    model: Any,
    tokenizer: Any,
    templates: Sequence[Template],
    connectors: Mapping[Kind, nn.Module],
    *,
    steps: int,
    batch: int,
    lr: float,
    draw: torch.Generator,
    console: Console,
    label: str,
) -> float:
    """Train all weights that ask for gradients, and the connectors; return the mean loss of the last tenth."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights += [parameter for connector in connectors.values() for parameter in connector.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
    warmup = max(1, steps // 20)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses: list[float] = []
    model.train()
    with console.bar(steps, label, "step") as bar:
        for step in range(steps):
            kinds, sign = templates[step % len(templates)]
            questions = [draw_question(kinds, sign, draw) for _ in range(batch)]
            inputs = inputs_of(model, tokenizer, connectors, questions, draw)
            logits = model(inputs_embeds=inputs).logits[:, -1]
            answers = token_ids(tokenizer, [question.answer for question in questions])[:, 0]
            loss = cross_entropy(logits.float(), answers.to(logits.device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach().item())
            bar.update(1)
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return math.fsum(last) / len(last)
