"""Let several trainers train in one process, step by step in turn, and time every step."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from measured import progress
from transformers import Trainer, TrainerCallback


def train_in_turns(trainers: Sequence[Trainer], *, warmup: int, label: str) -> tuple[list[list[float]], str]:
    """Train all ``trainers`` to their end; return the seconds of each one's steps after ``warmup``, and their unit.

    Every trainer runs its own unchanged loop in a thread, and only one of them is awake at a time. The order
    changes from round to round (A B, B A, ...), so that nobody always follows the same one. What disturbs the
    machine for longer than a step disturbs all of them. On a GPU the seconds are those of the clock; on a CPU
    those that the process computed, which other processes disturb less. Random numbers are shared by all:
    train without dropout, and no longer than an epoch.
    """
    rounds = max(trainer.args.max_steps for trainer in trainers)
    with progress(None, label, total=rounds) as bar:
        table = Table(len(trainers), bar)
        threads = []
        for number, trainer in enumerate(trainers):
            trainer.add_callback(Turn(table, number))
            threads.append(threading.Thread(target=table.seat, args=(number, trainer.train)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if table.failures:
        raise table.failures[0]
    return [seconds[warmup:] for seconds in table.seconds], "s" if torch.cuda.is_available() else "CPU s"


class Table:
    """Who is next, and how long the turns took. A turn is one round of a training loop: fetching the batch,
    the step, callbacks and logging."""

    def __init__(self, players: int, bar: Any) -> None:
        self.bar = bar
        self.changed = threading.Condition()
        self.playing = set(range(players))
        self.seconds: list[list[float]] = [[] for _ in range(players)]
        self.failures: list[BaseException] = []
        there, back = list(range(players)), list(reversed(range(players)))
        self.order = itertools.cycle([*there, *back])
        self.next = next(self.order)

    def seat(self, player: int, play: Any) -> None:
        """Play until the end, then leave the others alone."""
        self.wait(player)
        try:
            play()
        except BaseException as error:
            self.failures.append(error)
        with self.changed:
            self.playing.discard(player)
        self.hand_over()

    def end_turn(self, player: int) -> None:
        self.seconds[player].append(now() - self.started)
        if player == 0:
            self.bar.update()
        self.hand_over()
        self.wait(player)

    def wait(self, player: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.next == player)
        self.started = now()

    def hand_over(self) -> None:
        with self.changed:
            self.next = next(p for p in self.order if p in self.playing) if self.playing else None
            self.changed.notify_all()


class Turn(TrainerCallback):
    """Ends a player's turn after every step."""

    def __init__(self, table: Table, player: int) -> None:
        self.table, self.player = table, player

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.table.end_turn(self.player)


def now() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()
