"""What every layer says about the context's answer, and how much the context changes it.

Paper (as reported second-hand): with the logit lens as the only predictor,

    H_V(Y | h_l) = mean over items of -ln p_l[k],     I_V(h_l -> Y) = H_V(Y) - H_V(Y | h_l)

H_V(Y) is the same for all layers, so -H_V(Y | h_l) is what is kept. Ours: the mean over an answer's tokens, and

    S(l) = mean over items of KL(p_l with context || p_l without)   at the first position of the answer
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graftwork import UserError
from graftwork.evaluate.encoding import encode_prompt
from graftwork.evaluate.modes import evaluating
from graftwork.generate import Prompt
from graftwork.generate.passes import inner_model

from graftwork_cale.layers import layers_of
from graftwork_cale.lens import Lens


@dataclass(frozen=True)
class Item:
    """A prompt with and without its context, and the answer's tokens (none where it is not known)."""

    main: list[int]
    contrast: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Profile:
    """Items x L each, on the CPU in double precision.

    ``kl``: KL in nats at the first answer position. ``first``, ``first_without``: ln p_l of the answer's
    first token; ``mean``, ``mean_without``: of all its tokens, their mean; None without answers.
    ``norm``: |h_l| / |h_L| at the first answer position, with context.
    """

    kl: torch.Tensor
    norm: torch.Tensor
    first: torch.Tensor | None = None
    first_without: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    mean_without: torch.Tensor | None = None

    def curves(self) -> dict[str, list[float]]:
        """Return the means over items by name, entry l - 1 for layer l."""
        return {
            name: value.mean(0).tolist()
            for name in ("kl", "norm", "first", "first_without", "mean", "mean_without")
            if (value := getattr(self, name)) is not None
        }


def encode_item(tokenizer: Any, prompt: Prompt, answer: str | None, where: str) -> Item:
    """Return the tokens of a prompt pair and of its answer; ``where`` names the record.

    Raises:
        UserError: no context to leave out; an answer of no token.
    """
    if prompt.contrast is None:
        raise UserError(
            f"{where} has no context: layers are compared by prompts with and without it; give 'context' and "
            f"'question'"
        )
    main, contrast = (encode_prompt(tokenizer, part) for part in (prompt.main, prompt.contrast))
    if answer is None:
        return Item(main, contrast, [])
    tokens = _answer_tokens(tokenizer, prompt.main, main, answer)
    if not tokens:
        raise UserError(f"{where}: the answer '{answer}' has no tokens; every item needs one to look for")
    return Item(main, contrast, tokens)


def _answer_tokens(tokenizer: Any, prompt: Any, ids: list[int], answer: str) -> list[int]:
    """Return how the answer goes on after the prompt, its end left out."""
    if not answer.strip():
        return []
    if isinstance(prompt, str):
        answer = answer if prompt[-1].isspace() else f" {answer}"
        whole = encode_prompt(tokenizer, prompt + answer)
    else:
        whole = encode_prompt(tokenizer, [*prompt, {"role": "assistant", "content": answer}])
    if whole[: len(ids)] == ids:
        return whole[len(ids) :]
    # The end of the prompt melts with the answer: what generation sees is the prompt as it is.
    return tokenizer(answer, add_special_tokens=False)["input_ids"]


def measure(
    model: Any, items: Sequence[Item], *, batch_size: int = 8, progress: Callable[[int], Any] | None = None
) -> Profile:
    """Return the profile of ``model`` on ``items``; all have answers, or none.

    Two forward passes per batch. The lens works on B positions of one layer at a time (B x V, never
    B x L x V). The batch size does not change the result.

    Raises:
        UserError: nothing to measure; a model whose layers or head are not known.
    """
    if not items:
        raise UserError("there are no items to measure layers on")
    lens, parts = Lens(model), []
    # Prompts of like length go together, so that a batch pads little.
    order = sorted(range(len(items)), key=lambda index: -len(items[index].main))
    with evaluating(model):
        for start in range(0, len(items), batch_size):
            batch = [items[index] for index in order[start : start + batch_size]]
            parts.append(_measure(model, lens, batch))
            if progress:
                progress(len(batch))
    back = torch.tensor(order).argsort()
    labelled = bool(items[0].answer)
    names = ("kl", "norm", *(("first", "first_without", "mean", "mean_without") if labelled else ()))
    return Profile(**{name: torch.cat([part[name] for part in parts])[back] for name in names})


def _measure(model: Any, lens: Lens, batch: Sequence[Item]) -> dict[str, torch.Tensor]:
    """Return the rows of :class:`Profile` of one batch."""
    lengths = torch.tensor([max(len(item.answer), 1) for item in batch])
    streams = [
        _hidden_states(
            model, lens, [[*prompt, *item.answer[:-1]] for prompt, item in rows], int(lengths.max())
        )
        for rows in (
            [(item.main, item) for item in batch],
            [(item.contrast, item) for item in batch],
        )
    ]
    labelled = bool(batch[0].answer)
    found: dict[str, list[torch.Tensor]] = {}
    last = streams[0][-1]
    for layer in range(len(streams[0])):
        both = [stream[layer] for stream in streams]
        firsts = [lens(_at_first(hidden, lengths)) for hidden in both]
        divergence = (firsts[0].exp() * (firsts[0] - firsts[1])).sum(-1)
        # A divergence is not negative; its rounding may be.
        found.setdefault("kl", []).append(divergence.clamp_min(0))
        norms = [_at_first(hidden, lengths).float().norm(dim=-1) for hidden in (both[0], last)]
        found.setdefault("norm", []).append(norms[0] / norms[1])
        if labelled:
            for suffix, hidden, first in zip(("", "_without"), both, firsts, strict=True):
                first, mean = _answer_likelihoods(lens, hidden, first, batch, lengths)
                found.setdefault(f"first{suffix}", []).append(first)
                found.setdefault(f"mean{suffix}", []).append(mean)
    return {name: torch.stack(values, 1).double().cpu() for name, values in found.items()}


def _answer_likelihoods(
    lens: Lens, hidden: torch.Tensor, first: torch.Tensor, batch: Sequence[Item], lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ln p of every answer's first token, and its mean over the answer's tokens (B each)."""
    tokens = torch.tensor([item.answer[0] for item in batch], device=first.device)
    of_first = first.gather(-1, tokens[:, None])[:, 0]
    total = of_first.clone()
    later = [(row, place) for row, item in enumerate(batch) for place in range(1, len(item.answer))]
    # As many of them at once as there are items, so that nothing is larger than B x V.
    for start in range(0, len(later), len(batch)):
        rows, places = (torch.tensor(part) for part in zip(*later[start : start + len(batch)], strict=True))
        columns = hidden.shape[1] - lengths[rows] + places
        predicted = lens(hidden[rows.to(hidden.device), columns.to(hidden.device)])
        wanted = torch.tensor([batch[row].answer[place] for row, place in later[start : start + len(batch)]])
        likelihoods = predicted.gather(-1, wanted.to(first.device)[:, None])[:, 0]
        total = total.index_add(0, rows.to(first.device), likelihoods)
    return of_first, total / lengths.to(first)


def _at_first(hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return B x d: where the first token of each row's answer is predicted. ``hidden``: B x A x d, the end."""
    return hidden[torch.arange(len(hidden)), (hidden.shape[1] - lengths).to(hidden.device)]


def _hidden_states(model: Any, lens: Lens, rows: list[list[int]], keep: int) -> list[torch.Tensor]:
    """Return the residual stream after layers 1 to L at the last ``keep`` positions, B x keep x d each."""
    wide = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), max(wide, keep), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, ids.shape[1] - len(row) :] = torch.tensor(row)
        mask[number, ids.shape[1] - len(row) :] = 1
    takes = inspect.signature(inner_model(model).forward).parameters
    named: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
    if "position_ids" in takes:
        named["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    device = inner_model(model).device
    named = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in named.items()
    }
    if "logits_to_keep" in takes:
        named["logits_to_keep"] = 1
    with _kept(model, keep) as states:
        logits = model(input_ids=ids.to(device), **named).logits[:, -1]
    lens.check(states[-1][:, -1], logits)
    return states


@contextlib.contextmanager
def _kept(model: Any, keep: int) -> Iterator[list[torch.Tensor]]:
    """Collect what every layer puts out at the last ``keep`` positions."""
    states: list[torch.Tensor] = []

    def hook(module: torch.nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        # A copy: a view would hold the whole sequence in memory.
        states.append(hidden[:, -keep:].clone())

    handles = [layer.register_forward_hook(hook) for layer in layers_of(model)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
