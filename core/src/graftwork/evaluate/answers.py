"""Score a task by what the model writes: greedy answers against the gold answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from graftwork.data.labels import normalise
from graftwork.distributed import gather_objects, rank_and_world
from graftwork.errors import UserError
from graftwork.evaluate.modes import evaluating

if TYPE_CHECKING:
    from transformers import LogitsProcessor, PreTrainedTokenizerBase

    from graftwork.data.tasks import Task

Contexts = Callable[[], Iterable[AbstractContextManager[Any]]]
# Greedy means greedy: what a checkpoint's generation_config.json says besides is overruled.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


@dataclass(frozen=True)
class Score:
    """Accuracy (0 to 1), share of answers that are no label, per-item correctness, and the answers."""

    accuracy: float
    invalid: float
    correct: list[bool]
    answers: list[str]


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

    With labels, the first line of an answer counts, without case and punctuation; without, the whole
    answer must equal the completion but for blanks ("3.5" is not "35"), and ``invalid`` is 0.
    In a distributed run every process answers its share and all get the whole result.

    Raises:
        UserError: the task has no test items with prompt and answer; see also :func:`generate_answers`.
    """
    if task.test is None or not {"prompt", "completion"} <= set(task.test.column_names) or not len(task.test):
        raise UserError(f"task '{task.name}': test items need a prompt and an answer to be scored")
    rows: list[dict[str, Any]] = task.test.to_list()
    gold = [row.get("label") or _text(row["completion"]) for row in rows]
    same = normalise if task.labels else _collapsed
    rank, world = rank_and_world()
    answers = generate_answers(
        model,
        tokenizer,
        [rows[index]["prompt"] for index in _share(len(rows), rank, world)],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        first_line=bool(task.labels) or not any("\n" in answer.strip() for answer in gold),
        logits_processors=logits_processors,
        contexts=contexts,
        progress=progress,
    )
    answers = _gathered(answers, len(rows), world)
    given = [same(answer) for answer in answers]
    correct = [a == same(b) for a, b in zip(given, gold, strict=True)]
    labels = {normalise(label) for label in task.labels}
    invalid = sum(answer not in labels for answer in given) / len(given) if labels else 0.0
    return Score(sum(correct) / len(correct), invalid, correct, answers)


def generate_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    *,
    batch_size: int = 25,
    max_new_tokens: int = 8,
    first_line: bool = True,
    logits_processors: Sequence[LogitsProcessor] = (),
    contexts: Contexts = tuple,
    progress: Callable[[int], Any] | None = None,
) -> list[str]:
    """Return the greedy continuation of every prompt (strings or chat messages), without outer blanks.

    Prompts are sorted by length, so a batch pads little; answers come back in the order of the prompts.
    ``first_line`` ends an answer at its first line break. ``contexts()`` gives what is entered around
    each ``generate`` call. Neither the tokenizer nor the mode of any module is changed.

    Raises:
        UserError: a prompt is empty, too long for the model, or a chat without a chat template.
    """
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(ids) for ids in encoded), default=0)
    if limit and longest + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's window of "
            f"{limit}; set data.max_prompt_tokens or data.max_words"
        )
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]), reverse=True)
    settings = _settings(model, tokenizer, max_new_tokens)
    pad = settings["pad_token_id"]
    answers = [""] * len(encoded)
    with evaluating(model):
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
                    logits_processor=LogitsProcessorList(logits_processors),
                    stopping_criteria=StoppingCriteriaList([_FirstLine(tokenizer, width)] * first_line),
                    **settings,
                )
            texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for index, text in zip(chosen, texts, strict=True):
                text = text.strip()
                answers[index] = text.split("\n")[0].rstrip() if first_line else text
            if progress:
                progress(len(chosen))
    return answers


class _FirstLine(StoppingCriteria):
    """Stop a row once it has written a line break after some text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_width: int) -> None:
        self.tokenizer = tokenizer
        self.width = prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        return torch.tensor(["\n" in text.lstrip() for text in texts], device=input_ids.device)


def _settings(model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> dict[str, Any]:
    # The model's own end tokens win: a chat model has several, the tokenizer names one.
    end = getattr(model.generation_config, "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    pad = tokenizer.pad_token_id
    if pad is None:
        # Padding is masked, so any token serves where the tokenizer has none to spare.
        pad = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    return {
        **GREEDY,
        "max_new_tokens": max_new_tokens,
        "use_cache": True,
        "pad_token_id": pad,
        "eos_token_id": end,
    }


def _encode(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer(prompt, verbose=False)["input_ids"]
    elif not tokenizer.chat_template:
        raise UserError("the items are chats, but the tokenizer has no chat template; use data.prompt: plain")
    else:
        # A prompt that ends with words of the assistant is to be continued, as TRL does in training.
        continued = prompt[-1]["role"] == "assistant"
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=not continued, continue_final_message=continued, return_dict=True
        )["input_ids"]
    if not ids:
        raise UserError("a prompt is empty; every test item needs something to answer")
    return ids


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def _share(total: int, rank: int, world: int) -> list[int]:
    """Return the items of this process, the same number everywhere.

    With sharded weights every forward pass is a joint one, so a process without work would leave the
    others waiting; it repeats an item instead.
    """
    count = -(-total // world)
    return [(rank + step * world) % total for step in range(count)]


def _gathered(answers: list[str], total: int, world: int) -> list[str]:
    shares = gather_objects(answers)
    return [shares[index % world][index // world] for index in range(total)]
