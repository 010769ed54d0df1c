"""Score many settings (layer, strength) on labelled items: settings are rows of the same batch."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from graftwork.evaluate.answer_metrics import f1
from graftwork.evaluate.answers import GREEDY
from graftwork.evaluate.encoding import pad_token
from graftwork.evaluate.modes import evaluating
from graftwork.evaluate.qa import first_line
from graftwork.generate.passes import inner_model
from graftwork.generate.stopping import FirstLine
from transformers import DynamicCache, StoppingCriteriaList

from graftwork_cale.choose import Setting
from graftwork_cale.enhance import LayerEnhancement, Variant
from graftwork_cale.positions import Where


def score_settings(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    answers: Sequence[Sequence[str]],
    settings: Sequence[Setting],
    *,
    variant: Variant = "amplify",
    positions: Where = "predicting",
    max_new_tokens: int = 16,
    rows: int = 64,
    progress: Callable[[int], Any] | None = None,
) -> list[list[float]]:
    """Return the F1 (0 to 1) of the first line of every answer: for each setting, one per item.

    ``prompts``: tokens. At most ``rows`` rows go through the model together. Where only predicting positions
    are enhanced, a prompt is read once up to its last token, whatever the number of settings.
    """
    scores: list[list[float]] = [[0.0] * len(prompts) for _ in settings]
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    with evaluating(model):
        for begin in range(0, len(settings), rows):
            group = settings[begin : begin + rows]
            size = max(rows // len(group), 1)
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                written = _write(
                    model,
                    tokenizer,
                    [prompts[index] for index in chosen],
                    group,
                    variant,
                    positions,
                    max_new_tokens,
                )
                for place, index in enumerate(chosen):
                    for number in range(len(group)):
                        text = first_line(tokenizer, written[place * len(group) + number])
                        scores[begin + number][index] = f1(text, answers[index])
                if progress:
                    progress(len(chosen) * len(group))
    return scores


def _write(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    group: Sequence[Setting],
    variant: Variant,
    positions: Where,
    max_new_tokens: int,
) -> list[list[int]]:
    """Return the new tokens, the settings of the first prompt first."""
    inner, wide = inner_model(model), max(len(ids) for ids in prompts)
    pad = pad_token(tokenizer)
    ids = torch.full((len(prompts), wide), pad)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(prompts):
        ids[row, wide - len(tokens) :] = torch.tensor(tokens)
        mask[row, wide - len(tokens) :] = 1
    ids, mask = ids.to(inner.device), mask.to(inner.device)
    end = getattr(inner.generation_config, "eos_token_id", None)
    given: dict[str, Any] = {
        **GREEDY,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": pad,
        "eos_token_id": tokenizer.eos_token_id if end is None else end,
        "stopping_criteria": StoppingCriteriaList([FirstLine(tokenizer, wide)]),
    }
    if positions == "predicting" and wide > 1:
        given["past_key_values"] = _read(model, ids[:, :-1], mask[:, :-1], len(group))
    with contextlib.ExitStack() as stack:
        for layer in sorted({one.layer for one in group if one.layer is not None}):
            each = [one.strength if one.layer == layer else 1.0 for one in group]
            strength = torch.tensor(each, dtype=torch.float32, device=inner.device).repeat(len(prompts))
            stack.enter_context(LayerEnhancement(model, layer, strength, variant, positions))
        output = model.generate(
            input_ids=ids.repeat_interleave(len(group), 0),
            attention_mask=mask.repeat_interleave(len(group), 0),
            **given,
        )
    return output[:, wide:].tolist()


def _read(model: Any, ids: torch.Tensor, mask: torch.Tensor, copies: int) -> DynamicCache:
    """Return the cache of prompts that were read as they are, every row ``copies`` times."""
    cache = DynamicCache(config=inner_model(model).config)
    named: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
    takes = inspect.signature(inner_model(model).forward).parameters
    if "position_ids" in takes:
        named["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    if "logits_to_keep" in takes:
        named["logits_to_keep"] = 1
    model(input_ids=ids, **named)
    cache.batch_repeat_interleave(copies)
    return cache
