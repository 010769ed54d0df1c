"""The task: a named pair of training and test items that a stream is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import Dataset


@dataclass
class Task:
    """One task of a stream.

    ``train`` and ``test`` have the columns of the layout they were read from: ``prompt`` and
    ``completion`` after rendering (strings, or chat messages), ``text`` for plain language
    modelling, ``prompt``/``chosen``/``rejected`` for preferences. ``test`` may be None.
    ``labels`` lists the answer strings of a classification task, in the order of the options.
    ``notes`` tells what was dropped or looks suspicious.
    """

    name: str
    train: Dataset
    test: Dataset | None = None
    labels: list[str] = field(default_factory=list)
    index: int = 0
    total: int = 1
    notes: list[str] = field(default_factory=list)
