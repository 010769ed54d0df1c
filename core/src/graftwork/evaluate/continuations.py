"""How likely is a given continuation of a prompt, and would greedy decoding write it?

Where nothing takes part in decoding, one pass reads prompt and continuation. Otherwise the continuation is
decoded with every token forced, so that its probability is the one that the method would have drawn it with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor

from graftwork.errors import UserError
from graftwork.evaluate.answers import GREEDY, check_decoding
from graftwork.evaluate.encoding import encode_prompt, pad_token
from graftwork.evaluate.modes import evaluating
from graftwork.generate.decoding import Decoding, Encoded, decode_tokens
from graftwork.generate.passes import inner_model
from graftwork.models import is_encoder_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A prompt and its continuation, as tokens; neither is empty.
Pair = tuple[list[int], list[int]]
# Log-probability (natural, summed over the continuation), and whether each of its tokens was the likeliest.
Likelihood = tuple[float, bool]


def continuation_likelihoods(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    decoding: Decoding | None = None,
    batch_size: int = 8,
    progress: Callable[[int], Any] | None = None,
) -> list[Likelihood]:
    """Return the likelihood of every continuation, in the order of ``pairs``; batches are of like length.

    Raises:
        UserError: an encoder-decoder, a pair longer than the model's window, a combiner that needs contexts.
    """
    decoding = decoding or Decoding()
    check_decoding(decoding)
    _check(model, pairs)
    score = _read if decoding.plain else _forced
    order = sorted(range(len(pairs)), key=lambda index: (-sum(map(len, pairs[index])), index))
    found: list[Likelihood] = [(0.0, False)] * len(pairs)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        scores = score(model, tokenizer, [pairs[index] for index in chosen], decoding)
        for index, one in zip(chosen, scores, strict=True):
            found[index] = one
        if progress is not None:
            progress(len(chosen))
    return found


def first_choices(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 8,
    progress: Callable[[int], Any] | None = None,
) -> list[list[bool]]:
    """Return for every continuation which of its tokens were the likeliest, each after the true ones before it.

    Raises:
        UserError: an encoder-decoder, a pair longer than the model's window.
    """
    _check(model, pairs)
    order = sorted(range(len(pairs)), key=lambda index: (-sum(map(len, pairs[index])), index))
    found: list[list[bool]] = [[] for _ in pairs]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = _answers(model, tokenizer, [pairs[index] for index in chosen])
        for index, (logits, target) in zip(chosen, rows, strict=True):
            found[index] = (logits.argmax(-1) == target).tolist()
        if progress is not None:
            progress(len(chosen))
    return found


def answer_pair(tokenizer: Any, prompt: Any, completion: Any) -> Pair:
    """Return the tokens of an item (texts, or chat messages), parted where the answer begins, as in training.

    Where a tokenizer melts the end of the prompt with the beginning of the answer, the melted tokens belong to the
    answer.

    Raises:
        UserError: an empty prompt or answer, or a chat without a template for it.
    """
    asked = encode_prompt(tokenizer, prompt)
    if isinstance(prompt, str):
        whole = tokenizer(f"{prompt}{completion}{tokenizer.eos_token or ''}", verbose=False)["input_ids"]
    else:
        whole = tokenizer.apply_chat_template([*prompt, *completion], return_dict=True)["input_ids"]
    shared = next((at for at, pair in enumerate(zip(asked, whole, strict=False)) if pair[0] != pair[1]), None)
    shared = min(len(asked), len(whole)) if shared is None else shared
    if not 0 < shared < len(whole):
        raise UserError("an item has no answer after its prompt, or no prompt before its answer")
    return list(whole[:shared]), list(whole[shared:])


def _check(model: Any, pairs: Sequence[Pair]) -> None:
    if is_encoder_decoder(model.config):
        raise UserError(
            f"likelihoods of continuations need a decoder-only model; {model.config.model_type} has an encoder"
        )
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(prompt) + len(answer) - 1 for prompt, answer in pairs), default=0)
    if window and longest > window:
        raise UserError(
            f"a prompt and its continuation of {longest} tokens do not fit the model's window of {window}"
        )


def _read(model: Any, tokenizer: Any, pairs: Sequence[Pair], decoding: Decoding) -> list[Likelihood]:
    """Read every pair in one pass."""
    found = []
    for part, target in _answers(model, tokenizer, pairs):
        shares = part.to(torch.promote_types(part.dtype, torch.float32)).log_softmax(-1)
        chosen = shares.gather(-1, target[:, None]).sum()
        found.append((float(chosen), bool((shares.argmax(-1) == target).all())))
    return found


def _answers(
    model: Any, tokenizer: Any, pairs: Sequence[Pair]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield logits [A, V] and tokens [A] of every continuation; the last token is not read: nothing follows it."""
    texts = [(prompt + answer)[:-1] for prompt, answer in pairs]
    wide = max(map(len, texts))
    device = inner_model(model).device
    ids = torch.full((len(texts), wide), pad_token(tokenizer))
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    with evaluating(model):
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    for row, (text, (_, answer)) in enumerate(zip(texts, pairs, strict=True)):
        yield logits[row, len(text) - len(answer) : len(text)], torch.tensor(answer, device=logits.device)


def _forced(model: Any, tokenizer: Any, pairs: Sequence[Pair], decoding: Decoding) -> list[Likelihood]:
    """Decode every pair with its tokens forced."""
    force = _Force([answer for _, answer in pairs], pad_token(tokenizer))
    forcing = Decoding(
        decoding.combiner, (*decoding.processors, force), decoding.before_forward, decoding.contexts
    )
    vocabulary = model.config.get_text_config().vocab_size
    decode_tokens(
        model,
        [Encoded(prompt) for prompt, _ in pairs],
        tokenizer=tokenizer,
        decoding=forcing,
        **{
            **GREEDY,
            "max_new_tokens": max(len(answer) for _, answer in pairs),
            "use_cache": True,
            # No token ends a row: an end token may stand inside a continuation.
            "eos_token_id": vocabulary,
        },
    )
    return list(zip(force.total.tolist(), force.likeliest.tolist(), strict=True))


class _Force(LogitsProcessor):
    """Note how likely each row's next token is, and let nothing else be chosen. The last of all processors."""

    def __init__(self, answers: Sequence[Sequence[int]], filler: int) -> None:
        self.answers = answers
        self.filler = filler
        self.step = 0
        self.total = torch.zeros(len(answers), dtype=torch.float64)
        self.likeliest = torch.ones(len(answers), dtype=torch.bool)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        step, self.step = self.step, self.step + 1
        shares = scores.log_softmax(-1)
        forced = torch.full_like(scores, -torch.inf)
        for row, answer in enumerate(self.answers):
            token = answer[step] if step < len(answer) else self.filler
            forced[row, token] = 0
            if step < len(answer):
                self.total[row] += shares[row, token].item()
                self.likeliest[row] &= bool(scores[row].argmax() == token)
        return forced
