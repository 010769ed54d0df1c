"""Score a classification task without writing: how likely is each label as the answer to each prompt?

The log-probability of a label is that of exactly the tokens that training teaches the model to write after
the prompt: TRL's tokens of prompt, answer and end together, less what they share with the prompt's own. It is
the negative of an item's training loss, summed over its answer tokens. The end belongs to it because labels
are compared: without it a label that begins another one ("entail", "entailment") would never be less likely.

A prompt is read once; its keys and values stay in the cache while label after label is read on top of them.
Rows stay where they are for the whole batch, so that adapters with a state per row keep theirs.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from graftwork.errors import UserError
from graftwork.evaluate.encoding import Contexts, encode_prompt, pad_token
from graftwork.evaluate.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from graftwork.run import Run

GENERATE = "score it by what it writes (evaluate.scoring: generate)"


@dataclass(frozen=True)
class Question:
    """What a prompt and all its possible answers share, and how each answer goes on, as tokens."""

    prompt: list[int]
    answers: tuple[tuple[int, ...], ...]


def label_likelihoods(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    labels: Sequence[str],
    *,
    batch_size: int = 25,
    contexts: Contexts = tuple,
    progress: Callable[[int], Any] | None = None,
) -> torch.Tensor:
    """Return log p(label | prompt) (prompts x labels) on the CPU, in fp32 or the model's better precision.

    Prompts are strings or chat messages; they are sorted by length, so a batch pads little. ``contexts()``
    gives what is entered around each batch. The number of forward passes depends on the labels' tokens and
    the number of prompts only, as long as no prompt's end melts with a label into one token.

    Raises:
        UserError: a prompt is empty, too long for the model, or a chat without a chat template; the tokenizer
            has no end token; or the model keeps no cache that can go back to the end of the prompt.
    """
    check_model(model)
    questions = [question(tokenizer, prompt, labels) for prompt in prompts]
    _check_window(model, questions)
    pad = pad_token(tokenizer)
    rows = torch.zeros(len(prompts), len(labels))
    # Only questions with the same answers, token by token, can be asked together. Mostly those are all.
    order = sorted(
        range(len(prompts)), key=lambda index: (questions[index].answers, -len(questions[index].prompt))
    )
    with evaluating(model):
        for answers, same in itertools.groupby(order, key=lambda index: questions[index].answers):
            indices = list(same)
            for start in range(0, len(indices), batch_size):
                chosen = indices[start : start + batch_size]
                with contextlib.ExitStack() as stack:
                    for context in contexts():
                        stack.enter_context(context)
                    found = _batch(model, [questions[index].prompt for index in chosen], answers, pad)
                rows = rows.to(found.dtype)
                rows[chosen] = found
                if progress:
                    progress(len(chosen))
    return rows


def most_likely(likelihoods: torch.Tensor, labels: Sequence[str]) -> list[str]:
    """Return the likeliest label of every row, the first of equals; no label ("") where a row is not finite."""
    return [
        labels[max(range(len(labels)), key=row.__getitem__)] if good else ""
        for row, good in zip(likelihoods.tolist(), likelihoods.isfinite().all(1).tolist(), strict=True)
    ]


def question(tokenizer: Any, prompt: Any, labels: Sequence[str]) -> Question:
    """Return the tokens of ``prompt`` and, for every label, those that answer and end it, as in training.

    Where a tokenizer melts the end of the prompt with the beginning of a label, the melted tokens are counted
    with the answer, for all labels alike: all of them explain the same text after the same tokens.

    Raises:
        UserError: see :func:`label_likelihoods`.
    """
    asked = encode_prompt(tokenizer, prompt)
    if isinstance(prompt, str):
        end = tokenizer.eos_token
        if end is None:
            raise UserError(f"the tokenizer has no end token, so an answer has no end; {GENERATE}")
        whole = tokenizer([f"{prompt} {label}{end}" for label in labels], verbose=False)["input_ids"]
    else:
        chats = [[*prompt, {"role": "assistant", "content": label}] for label in labels]
        whole = tokenizer.apply_chat_template(chats, return_dict=True)["input_ids"]
    shared = min(_in_common(asked, ids) for ids in whole)
    if not shared:
        raise UserError(
            "a prompt and its answer have no first token in common, so there is nothing to answer"
        )
    return Question(asked[:shared], tuple(tuple(ids[shared:]) for ids in whole))


def check_plugins(run: Run, model: Any) -> None:
    """Raise ``UserError`` where a plugin wants to change how answers are written: here none are."""
    changing = [name for name, given in run.plugins.call("logits_processors", run=run, model=model) if given]
    changing += [name for name, _ in run.plugins.call("combiner", run=run, model=model)]
    changing += run.plugins.implements("before_forward")
    if changing:
        raise UserError(
            f"plugin '{changing[0]}' changes how answers are written, which likelihood scoring would ignore; "
            f"{GENERATE}"
        )


def check_model(model: Any, adapter: Any = None) -> None:
    """Raise ``UserError`` where answers cannot be read on top of a cached prompt.

    ``model`` may be on the meta device; ``adapter`` is the PEFT config that it will get, if any.
    """
    kind = model.config.model_type
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(
            f"likelihood scoring reads prompt and answer as one text, and {kind} is an encoder-decoder; {GENERATE}"
        )
    adapters = [*getattr(model, "peft_config", {}).values(), *([adapter] if adapter else [])]
    if any(config.is_prompt_learning for config in adapters):
        raise UserError(
            f"likelihood scoring continues a cached prompt, which PEFT's prompt learning does not; {GENERATE}"
        )
    if "past_key_values" not in _parameters(model):
        raise UserError(f"{kind} has no key-value cache, which likelihood scoring works with; {GENERATE}")
    _cache(model.config)


def _batch(
    model: Any, prompts: list[list[int]], answers: tuple[tuple[int, ...], ...], pad: int
) -> torch.Tensor:
    """Return log p(answer | prompt) (b x k). Answers are visited in alphabetical order and the cache goes back
    only to where they part, so a beginning that several share is read once."""
    width = max(len(ids) for ids in prompts)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    lengths = mask.sum(1, keepdim=True)
    reader = _Reader(model, mask.to(model.device))
    # predicted[p] (b x vocabulary): the token after the prompt and p tokens of the answer that is being read.
    predicted = reader.read(ids, (mask.cumsum(1) - 1).clamp_min(0), last_only=True)
    if reader.cache.get_seq_length() != width:
        raise UserError(_no_way_back(model.config))
    result = torch.empty(len(prompts), len(answers), dtype=predicted[0].dtype)
    inside: tuple[int, ...] = ()
    for column in sorted(range(len(answers)), key=answers.__getitem__):
        answer = answers[column]
        # Nothing follows the last token, so it need not be read.
        kept = _in_common(inside, answer[:-1])
        reader.forget(len(inside) - kept)
        del predicted[kept + 1 :]
        inside = answer[:-1]
        if new := inside[kept:]:
            tokens = torch.tensor(new).expand(len(prompts), -1)
            predicted += reader.read(tokens, lengths + torch.arange(kept, len(inside)))
        parts = [predicted[position][:, token] for position, token in enumerate(answer)]
        result[:, column] = torch.stack(parts).sum(0).cpu()
    return result


class _Reader:
    """A batch that is read forward into a cache and taken back."""

    def __init__(self, model: Any, mask: torch.Tensor) -> None:
        self.model = model
        self.mask = mask
        self.parameters = _parameters(model)
        self.cache = _cache(model.config)

    def read(
        self, ids: torch.Tensor, positions: torch.Tensor, *, last_only: bool = False
    ) -> list[torch.Tensor]:
        """Read ``ids`` (b x l) after what was read; return for each, or the last, the log-probabilities of
        what follows (b x vocabulary)."""
        if self.cache.get_seq_length():
            self.mask = torch.cat([self.mask, self.mask.new_ones(ids.shape)], 1)
        inputs: dict[str, Any] = {"input_ids": ids.to(self.mask.device), "attention_mask": self.mask}
        if "position_ids" in self.parameters:
            inputs["position_ids"] = positions.to(self.mask.device)
        if last_only and "logits_to_keep" in self.parameters:
            # Logits of a whole prompt over the vocabulary would be most of the memory.
            inputs["logits_to_keep"] = 1
        logits = self.model(**inputs, past_key_values=self.cache, use_cache=True).logits
        if last_only:
            logits = logits[:, -1:]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return list(logits.log_softmax(-1).unbind(1))

    def forget(self, tokens: int) -> None:
        """Take the last ``tokens`` tokens back."""
        if tokens:
            self.cache.crop(-tokens)
            self.mask = self.mask[:, :-tokens]


def _cache(config: Any) -> DynamicCache:
    """Return an empty cache that can go back by any number of tokens; refuse a model that has none."""
    cache = DynamicCache(config=config)
    if {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        # A layer with a sliding window would drop what lies behind it and could not go back. Whole layers can;
        # the window is still that of the attention mask.
        return DynamicCache()
    if not cache.is_croppable or any(cache.is_sliding) or any(cache.is_linear):
        raise UserError(_no_way_back(config))
    return cache


def _no_way_back(config: Any) -> str:
    return (
        f"the cache of {config.model_type} cannot go back to the end of the prompt, as likelihood scoring "
        f"needs it to; {GENERATE}"
    )


def _parameters(model: Any) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(base.forward).parameters


def _in_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return with how many equal tokens both begin."""
    pairs = zip(first, second, strict=False)
    return next(
        (place for place, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second))
    )


def _check_window(model: Any, questions: Sequence[Question]) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(
        (len(item.prompt) + len(answer) for item in questions for answer in item.answers), default=0
    )
    if limit and longest > limit:
        raise UserError(
            f"a prompt and its answer of {longest} tokens do not fit the model's window of {limit}; "
            f"set data.max_prompt_tokens or data.max_words"
        )
