"""Score a task: what the model answers, greedily written or the likeliest label, against the gold answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from graftwork.data.labels import normalise
from graftwork.distributed import gather_objects, rank_and_world
from graftwork.errors import UserError
from graftwork.evaluate.encoding import encode_prompt, pad_token
from graftwork.evaluate.likelihood import label_likelihoods, most_likely
from graftwork.generate.decoding import Decoding, Encoded, decode_tokens
from graftwork.models import is_encoder_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    decoding: Decoding | None = None,
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
    same = normalise if task.labels else collapsed
    rank, world = rank_and_world()
    prompts = [rows[index]["prompt"] for index in _share(len(rows), rank, world)]
    decoding = decoding or Decoding()
    if scoring == "likelihood" and task.labels:
        choices = task.labels if candidates is None else candidates
        likelihoods = label_likelihoods(
            model,
            tokenizer,
            prompts,
            choices,
            batch_size=batch_size,
            contexts=decoding.contexts,
            progress=progress,
        )
        answers = most_likely(likelihoods, choices)
    else:
        scoring = "generate"
        answers = generate_answers(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            first_line=bool(task.labels) or not any("\n" in answer.strip() for answer in gold),
            decoding=decoding,
            batch_size=batch_size,
            progress=progress,
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
    decoding: Decoding | None = None,
    progress: Callable[[int], Any] | None = None,
) -> list[str]:
    """Return the greedy continuation of every prompt (strings or chat messages), without outer blanks.

    Prompts are sorted by length, so a batch pads little; answers come back in the order of the prompts.
    ``first_line`` ends an answer at its first line break. ``decoding`` is what plugins bring. Neither the
    tokenizer nor the mode of any module is changed.

    Raises:
        UserError: a prompt is empty, too long for the model, or a chat without a chat template; ``decoding``
            has a combiner that needs a context (see :func:`check_decoding`).
    """
    decoding = decoding or Decoding()
    check_decoding(decoding)
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
    answers = [""] * len(encoded)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found = decode_tokens(
            model,
            [Encoded(encoded[index]) for index in chosen],
            tokenizer=tokenizer,
            decoding=decoding,
            first_line=first_line,
            **settings,
        )
        for index, tokens in zip(chosen, found, strict=True):
            text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
            answers[index] = text.split("\n")[0].rstrip() if first_line else text
        if progress:
            progress(len(chosen))
    return answers


def check_decoding(decoding: Decoding, what: str = "the items of a task") -> None:
    """Refuse a combiner that contrasts a prompt with one without its context: ``what`` is asked has one text.

    Raises:
        UserError: there is such a combiner.
    """
    combiner = decoding.combiner
    if combiner is not None and combiner.amateur is None:
        raise UserError(
            f"'{combiner.name}' contrasts a prompt with the same question without its context, and {what} have no "
            f"context apart; score them without its plugin"
        )


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


def collapsed(text: str) -> str:
    """Return ``text`` with every stretch of blanks and line ends as one blank, none at its ends."""
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
