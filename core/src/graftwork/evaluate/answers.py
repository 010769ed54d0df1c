"""Score a task by what the model writes: greedy answers, exact match after normalisation."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from graftwork.errors import UserError

if TYPE_CHECKING:
    from transformers import LogitsProcessor, PreTrainedTokenizerBase

    from graftwork.data.tasks import Task

_PUNCTUATION = str.maketrans("", "", string.punctuation)
Contexts = Callable[[], Iterable[AbstractContextManager[Any]]]


@dataclass(frozen=True)
class Score:
    """Accuracy (0 to 1), share of answers that are no label, per-item correctness, and the answers."""

    accuracy: float
    invalid: float
    correct: list[bool]
    answers: list[str]


def normalise(text: str) -> str:
    """Return ``text`` in lower case without ASCII punctuation and with single blanks."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def score_task(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    batch_size: int = 25,
    max_new_tokens: int = 8,
    logits_processors: Sequence[LogitsProcessor] = (),
    contexts: Contexts = tuple,
    progress: Callable[[int], Any] | None = None,
) -> Score:
    """Let the model answer every test item of ``task`` and compare with the gold answer.

    In a distributed run every process answers its share and all get the whole result.
    """
    assert task.test is not None
    if not {"prompt", "completion"} <= set(task.test.column_names):
        raise UserError(f"task '{task.name}': test items need a prompt and an answer to be scored")
    rows = list(task.test)
    rank, world = _rank_and_world()
    answers = generate_answers(
        model,
        tokenizer,
        [row["prompt"] for row in rows[rank::world]],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        logits_processors=logits_processors,
        contexts=contexts,
        progress=progress,
    )
    answers = _gathered(answers, len(rows), world)
    gold = [normalise(row.get("label") or _text(row["completion"])) for row in rows]
    given = [normalise(answer) for answer in answers]
    correct = [a == b for a, b in zip(given, gold, strict=True)]
    labels = {normalise(label) for label in task.labels}
    invalid = sum(answer not in labels for answer in given) / len(given) if labels else 0.0
    return Score(sum(correct) / len(correct), invalid, correct, answers)


@torch.inference_mode()
def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    batch_size: int = 25,
    max_new_tokens: int = 8,
    logits_processors: Sequence[LogitsProcessor] = (),
    contexts: Contexts = tuple,
    progress: Callable[[int], Any] | None = None,
) -> list[str]:
    """Return the first line of the greedy continuation of every prompt (strings or chat messages).

    Prompts are sorted by length, so a batch pads little; answers come back in the order of the prompts.
    """
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(ids) for ids in encoded), default=0)
    if limit and longest + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's window of {limit}; "
            f"set data.max_words"
        )
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]), reverse=True)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers = [""] * len(encoded)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = len(encoded[chosen[0]])
            ids = torch.full((len(chosen), width), pad)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(chosen):
                ids[row, width - len(encoded[index]) :] = torch.tensor(encoded[index])
                mask[row, width - len(encoded[index]) :] = 1
            with contextlib.ExitStack() as stack:
                for context in contexts():
                    stack.enter_context(context)
                output = model.generate(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=pad,
                    logits_processor=LogitsProcessorList(logits_processors),
                    stopping_criteria=StoppingCriteriaList([_FirstLine(tokenizer, width)]),
                )
            texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = text.strip("\n").split("\n")[0].strip()
            if progress:
                progress(len(chosen))
    finally:
        model.train(was_training)
    return answers


class _FirstLine(StoppingCriteria):
    """Stop a row once it has written a line break after some text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_width: int) -> None:
        self.tokenizer = tokenizer
        self.width = prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        done = [
            "\n" in text.strip("\n") or (bool(text.strip("\n")) and text.endswith("\n")) for text in texts
        ]
        return torch.tensor(done, device=input_ids.device)


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _gathered(answers: list[str], total: int, world: int) -> list[str]:
    if world == 1:
        return answers
    shares: list[list[str]] = [[] for _ in range(world)]
    torch.distributed.all_gather_object(shares, answers)
    merged = [""] * total
    for rank, share in enumerate(shares):
        merged[rank::world] = share
    return merged
