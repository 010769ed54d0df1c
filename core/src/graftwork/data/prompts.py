"""How a classification item becomes a prompt and an answer."""

from __future__ import annotations

from typing import Any

from graftwork.data.layouts import RawTask
from graftwork.data.options import DataOptions


def render(task: RawTask, items: list[dict[str, Any]], options: DataOptions) -> list[dict[str, Any]]:
    """Return rows with ``prompt`` and ``completion`` (and ``label``) for classification items.

    Items of other forms are returned as they are. Pieces are joined, never formatted: a brace in an
    instruction stays a brace.
    """
    if task.form != "classification":
        return items
    rows = []
    for item in items:
        prompt = classification_prompt(task, item["sentence"], options)
        if options.prompt == "chat":
            rows.append(
                {
                    "prompt": [{"role": "user", "content": prompt}],
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
    listed = "Option: " + ", ".join(task.labels) + " \n" if options.options_in_prompt else ""
    if options.max_words is not None:
        sentence = cut_words(sentence, options.max_words)
    return head + task.instruction + listed + sentence.rstrip() + "\nAnswer:"


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


def leaks(options: DataOptions) -> list[str]:
    """Return what this way of asking gives away about the task, in words, for every report."""
    found = []
    if options.prompt == "published":
        found.append("task and data set name in the prompt")
    if options.options_in_prompt:
        found.append("label options in the prompt")
    return found
