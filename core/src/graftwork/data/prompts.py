"""How a classification item becomes a prompt and an answer, and a prompt and its answer a chat."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from graftwork.data.layouts import RawTask
from graftwork.data.options import DataOptions
from graftwork.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One blank before a word, or line ends: the gap between a plain prompt and its answer. An indent is no such gap.
_PARTING = re.compile(r"^(?: (?=\S)|\n+)")


def render(
    task: RawTask,
    items: list[dict[str, Any]],
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[dict[str, Any]]:
    """Return rows with ``prompt`` and ``completion`` (and ``label``) for classification items.

    Completion items of text become messages where ``options.prompt`` is ``chat``, and long prompts of theirs lose
    their middle; items of other forms are returned as they are.
    Pieces are joined, never formatted: a brace in an instruction stays a brace. ``tokenizer`` is what
    ``options.max_prompt_tokens`` counts with; without one prompts are not cut by tokens.

    Raises:
        UserError: a prompt is longer than ``max_prompt_tokens`` even without its sentence.
    """
    if task.form == "completion":
        return [_completion_row(item, options, tokenizer) for item in items]
    if task.form != "classification":
        return items
    rows = []
    for item in items:
        prompt = classification_prompt(task, item["sentence"], options)
        if tokenizer is not None and options.max_prompt_tokens is not None:
            prompt = _fitted(task, item["sentence"], prompt, options, tokenizer)
        if options.prompt == "chat":
            rows.append(
                {
                    "prompt": _chat(prompt),
                    "completion": [{"role": "assistant", "content": item["label"]}],
                    "label": item["label"],
                }
            )
        else:
            rows.append({"prompt": prompt, "completion": " " + item["label"], "label": item["label"]})
    return rows


def classification_prompt(task: RawTask, sentence: str, options: DataOptions) -> str:
    """Return ``[Task, Dataset] instruction, options, sentence, Answer:`` in the CL benchmark's wording.

    A long sentence loses its end to ``max_words``; the tail ``Answer:`` always stays.
    """
    head = f"Task:{task.group}\nDataset:{task.name}\n" if options.prompt == "published" else ""
    # The published scripts ask tasks of a group without instruction (COPA) without options, too.
    listed = options.options_in_prompt and (task.instruction or options.prompt != "published")
    if listed:
        head += task.instruction + "Option: " + ", ".join(task.labels) + " \n"
    else:
        head += task.instruction
    if options.max_words is not None:
        sentence = cut_words(sentence, options.max_words)
    if options.prompt != "published":
        sentence = sentence.rstrip()
    return head + sentence + "\nAnswer:"


def cut_words(text: str, count: int) -> str:
    """Return the first ``count`` blank-separated words of ``text``, with its line breaks kept."""
    seen, position = 0, 0
    while position < len(text):
        while position < len(text) and text[position].isspace():
            position += 1
        if position == len(text):
            break
        if seen == count:
            return text[:position].rstrip()
        while position < len(text) and not text[position].isspace():
            position += 1
        seen += 1
    return text


def without_middle(
    prompt: Any, limit: int, tokenizer: PreTrainedTokenizerBase, *, as_chat: bool = False
) -> Any:
    """Return a prompt of at most ``limit`` tokens: its beginning and its end. Chats are returned as they are.

    What to do stands at the beginning of a long prompt, and what is asked for at its end. With ``as_chat`` the
    tokens are those of the prompt as a user message.
    """

    def length(text: str) -> int:
        return _length(text, tokenizer, as_chat=as_chat)

    def kept(count: int) -> str:
        return prompt[: count - count // 2] + prompt[len(prompt) - count // 2 :]

    if not isinstance(prompt, str) or length(prompt) <= limit:
        return prompt
    low, high = 1, len(prompt)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if length(kept(middle)) <= limit else (low, middle - 1)
    # Fewer characters can be more tokens, where two would have merged.
    while low > 1 and length(kept(low)) > limit:
        low -= 1
    return kept(low)


def leaks(options: DataOptions) -> list[str]:
    """Return what this way of asking gives away about the task, in words, for every report.

    Items that stand in both files are a matter of the data, not of the asking: see ``Task.notes``.
    """
    found = []
    if options.prompt == "published":
        found.append("task and data set name in the prompt")
    if options.options_in_prompt:
        found.append("label options in the prompt")
    return found


def _fitted(task: RawTask, sentence: str, prompt: str, options: DataOptions, tokenizer: Any) -> str:
    """Return the prompt with as much of the sentence as fits, in whole words where it has words."""
    limit = options.max_prompt_tokens
    assert limit is not None

    def length(text: str) -> int:
        return _length(text, tokenizer, as_chat=options.prompt == "chat")

    if length(prompt) <= limit:
        return prompt
    bare = length(classification_prompt(task, "", options))
    if bare > limit:
        raise UserError(
            f"data.max_prompt_tokens is {limit}, but a prompt of task '{task.name}' has {bare} tokens before "
            f"any sentence; set it to more, or data.options_in_prompt to false"
        )
    low, high = 0, len(sentence)
    while low < high:
        middle = (low + high + 1) // 2
        if length(classification_prompt(task, sentence[:middle], options)) <= limit:
            low = middle
        else:
            high = middle - 1
    kept = sentence[:low]
    if kept.strip() and not sentence[low : low + 1].isspace():
        whole = kept.rsplit(None, 1)[0]
        # A text without blanks (Chinese, code) is cut between characters.
        kept = whole if 2 * len(whole) >= low else kept
    # Where two tokens would have merged, fewer characters can be more tokens.
    while kept and length(classification_prompt(task, kept, options)) > limit:
        kept = kept[:-1]
    return classification_prompt(task, kept, options)


def _completion_row(
    item: dict[str, Any], options: DataOptions, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    prompt, completion = item["prompt"], item["completion"]
    as_chat = options.prompt == "chat" and isinstance(prompt, str) and isinstance(completion, str)
    limit = options.max_prompt_tokens
    if as_chat:
        # What parts a prompt from its answer is now the template's own matter.
        prompt, completion = prompt.rstrip(), _PARTING.sub("", completion)
    if tokenizer is not None and limit is not None:
        if as_chat and (bare := _length("", tokenizer, as_chat=True)) >= limit:
            raise UserError(
                f"data.max_prompt_tokens is {limit}, but a chat has {bare} tokens before any prompt; set it to more"
            )
        prompt = without_middle(prompt, limit, tokenizer, as_chat=as_chat)
    if as_chat:
        prompt, completion = _chat(prompt), [{"role": "assistant", "content": completion}]
    return {**item, "prompt": prompt, "completion": completion}


def _length(text: str, tokenizer: Any, *, as_chat: bool) -> int:
    """Return how many tokens ``text`` is, alone or as a user message that an answer is asked for."""
    if as_chat:
        ids = tokenizer.apply_chat_template(_chat(text), add_generation_prompt=True, return_dict=True)
        return len(ids["input_ids"])
    return len(tokenizer(text, verbose=False)["input_ids"])


def _chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]
