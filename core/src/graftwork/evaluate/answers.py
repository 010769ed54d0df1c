"""Score a task: what the model answers, greedily written or the likeliest label, against the gold answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from graftwork.data.labels import normalise
from graftwork.distributed import gather_objects, rank_and_world
from graftwork.errors import UserError
from graftwork.evaluate.encoding import Contexts, encode_prompt, pad_token
from graftwork.evaluate.likelihood import label_likelihoods, most_likely
from graftwork.evaluate.modes import evaluating
from graftwork.generate.stopping import FirstLine
from graftwork.models import is_encoder_decoder

if TYPE_CHECKING:
    from transformers import LogitsProcessor, PreTrainedTokenizerBase

    from graftwork.data.tasks import Task

Scoring = Literal["generate", "likelihood"]
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
    """Accuracy (0 to 1), share of answers that are no label, per-item correctness, and the answers.

    ``scoring`` is how the answers came about.
    """

    accuracy: float
    invalid: float
    correct: list[bool]
    answers: list[str]
    scoring: Scoring


def score_task(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    scoring: Scoring = "generate",
    candidates: Sequence[str] | None = None,
    batch_size: int = 25,
    max_new_tokens: int = 8,
    logits_processors: Sequence[LogitsProcessor] = (),
    contexts: Contexts = tuple,
    progress: Callable[[int], Any] | None = None,
) -> Score:
    """Let the model answer every test item of ``task`` and compare with the gold answer.

    With labels, the first line of an answer counts, without case and punctuation; without, the whole
    answer must equal the completion but for blanks ("3.5" is not "35"), and ``invalid`` is 0.
    With ``scoring="likelihood"`` the answer is the likeliest of ``candidates`` (the task's labels where None),
    and ``max_new_tokens`` plays no part; a task without labels is answered by generation all the same.
    ``invalid`` then is the share of items given another task's label (or none, where nothing is finite).
    In a distributed run every process answers its share and all get the whole result.

    Raises:
        UserError: the task has no test items with prompt and answer; see also :func:`generate_answers` and
            :func:`graftwork.evaluate.likelihood.label_likelihoods`.
    """
    if task.test is None or not {"prompt", "completion"} <= set(task.test.column_names) or not len(task.test):
        raise UserError(f"task '{task.name}': test items need a prompt and an answer to be scored")
    rows: list[dict[str, Any]] = task.test.to_list()
    gold = [row.get("label") or _text(row["completion"]) for row in rows]
    same = normalise if task.labels else _collapsed
    rank, world = rank_and_world()
    prompts = [rows[index]["prompt"] for index in _share(len(rows), rank, world)]
    shared: dict[str, Any] = {"batch_size": batch_size, "contexts": contexts, "progress": progress}
    if scoring == "likelihood" and task.labels:
        choices = task.labels if candidates is None else candidates
        answers = most_likely(label_likelihoods(model, tokenizer, prompts, choices, **shared), choices)
    else:
        scoring = "generate"
        answers = generate_answers(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            first_line=bool(task.labels) or not any("\n" in answer.strip() for answer in gold),
            logits_processors=logits_processors,
            **shared,
        )
    answers = _gathered(answers, len(rows), world)
    given = [same(answer) for answer in answers]
    correct = [a == same(b) for a, b in zip(given, gold, strict=True)]
    labels = {normalise(label) for label in task.labels}
    invalid = sum(answer not in labels for answer in given) / len(given) if labels else 0.0
    return Score(sum(correct) / len(correct), invalid, correct, answers, scoring)


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
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    # An encoder-decoder's prompt and answer are two texts; a decoder's are one, which padding must not part.
    apart = is_encoder_decoder(model.config)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(ids) for ids in encoded), default=0)
    if limit and (max(longest, max_new_tokens) if apart else longest + max_new_tokens) > limit:
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
                length = len(encoded[index])
                place = slice(length) if apart else slice(width - length, width)
                ids[row, place] = torch.tensor(encoded[index])
                mask[row, place] = 1
            begin = answer_begin(model, width)
            with contextlib.ExitStack() as stack:
                for context in contexts():
                    stack.enter_context(context)
                output = model.generate(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    logits_processor=LogitsProcessorList(logits_processors),
                    stopping_criteria=StoppingCriteriaList([FirstLine(tokenizer, begin)] * first_line),
                    **settings,
                )
            texts = tokenizer.batch_decode(output[:, begin:], skip_special_tokens=True)
            for index, text in zip(chosen, texts, strict=True):
                text = text.strip()
                answers[index] = text.split("\n")[0].rstrip() if first_line else text
            if progress:
                progress(len(chosen))
    return answers


def answer_begin(model: Any, prompt_width: int) -> int:
    """Return where the answer begins in what ``generate`` returns for a prompt of ``prompt_width`` tokens.

    A decoder repeats the prompt; an encoder-decoder begins with its start token alone.
    """
    return 1 if is_encoder_decoder(model.config) else prompt_width


def _settings(model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> dict[str, Any]:
    # The model's own end tokens win: a chat model has several, the tokenizer names one.
    end = getattr(model.generation_config, "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    return {
        **GREEDY,
        "max_new_tokens": max_new_tokens,
        "use_cache": True,
        "pad_token_id": pad_token(tokenizer),
        "eos_token_id": end,
    }


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
