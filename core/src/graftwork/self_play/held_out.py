"""Held-out targets through the iterations: how likely they stay, and whether the model writes them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graftwork.distributed import gather_objects, rank_and_world
from graftwork.evaluate.answers import collapsed
from graftwork.generate.decoding import Decoding
from graftwork.generate.prompts import Prompt
from graftwork.generate.session import generate
from graftwork.hookspecs import LineChart
from graftwork.self_play.items import Item
from graftwork.self_play.metrics import METRICS
from graftwork.self_play.scoring import Scorer
from graftwork.train.scores import Scores

if TYPE_CHECKING:
    from graftwork.console import Console
    from graftwork.data.tasks import Task
    from graftwork.run import Run
    from graftwork.train.adapters import AdapterStack


class HeldOut(Scores):
    """What an iteration did to items that are not trained on; takes the place of a stream's score matrix.

    ``log_probs[t]`` are the log-probabilities of the targets after t iterations (nats, summed over tokens),
    ``answers[t]`` the greedy answers as (tokens, ended, text).
    """

    def __init__(
        self,
        run: Run,
        tasks: list[Task],
        tokenizer: Any,
        console: Console,
        items: Sequence[Item],
        scorer: Scorer,
    ) -> None:
        super().__init__(run, tasks, tokenizer, console)
        self.held_out_items = items
        self.scorer = scorer
        self.log_probs: list[list[float]] = []
        self.answers: list[list[list[Any]]] = []

    def before(self, stack: AdapterStack) -> None:
        super().before(stack)
        self._measure(stack)

    def after(self, index: int, stack: AdapterStack) -> None:
        self._measure(stack)

    def _measure(self, stack: AdapterStack) -> None:
        items = self.held_out_items
        if not items:
            return
        started = time.perf_counter()
        rank, world = rank_and_world()
        mine = range(rank, len(items), world)
        with self.console.bar(2 * len(mine), "held-out items") as bar:
            sequences = [(items[k].prompt_ids, items[k].target_ids) for k in mine]
            values = self.scorer(stack.model, sequences, bar.update)
            written = generate(
                stack.model,
                self.tokenizer,
                [Prompt(items[k].prompt) for k in mine],
                decoding=Decoding.from_plugins(self.run, stack.model),
                batch_size=self.options.batch_size,
                progress=bar.update,
                max_new_tokens=self.options.max_new_tokens,
                do_sample=False,
            )
            texts = [
                [len(one.tokens), len(one.tokens) < self.options.max_new_tokens, one.text] for one in written
            ]
        found: dict[int, tuple[float, list[Any]]] = {}
        for part in gather_objects(dict(zip(mine, zip(values, texts, strict=True), strict=True))):
            found.update(part)
        self.log_probs.append([found[k][0] for k in range(len(items))])
        self.answers.append([found[k][1] for k in range(len(items))])
        self.seconds += time.perf_counter() - started
        self._tell()

    def _tell(self) -> None:
        now = len(self.log_probs) - 1
        figures = {
            "nll": _mean(self._nll(now)),
            "exact": _mean(self._exact(now)),
            **({"reward": _mean(self._change(now - 1, now))} if now else {}),
        }
        self.run.events.write("held-out", iteration=now, **figures)
        stage = f"after {self.tasks[now - 1].name}" if now else "before training"
        reward = f"  target reward {figures['reward']:+.3f} nats" if now else ""
        self.console.say(
            f"  {stage:<24} exact {100 * figures['exact']:.1f} %  target {figures['nll']:.4f} nats a token{reward}"
        )

    # ------------------------------------------------------------------ figures

    def _nll(self, at: int) -> list[float]:
        return [
            -value / len(item.target_ids)
            for value, item in zip(self.log_probs[at], self.held_out_items, strict=True)
        ]

    def _exact(self, at: int) -> list[float]:
        return [
            float(collapsed(text) == collapsed(item.target))
            for (_, _, text), item in zip(self.answers[at], self.held_out_items, strict=True)
        ]

    def _change(self, before: int, after: int) -> list[float]:
        return [b - a for a, b in zip(self.log_probs[before], self.log_probs[after], strict=True)]

    def _distinct(self, at: int) -> float | None:
        pairs = [pair for _, _, text in self.answers[at] for pair in itertools.pairwise(text.split())]
        return len(set(pairs)) / len(pairs) if pairs else None

    # ------------------------------------------------------------------ what a stage keeps, what a run shows

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "log_probs": self.log_probs, "answers": self.answers}

    def restore(self, record: Mapping[str, Any], seconds: float) -> None:
        super().restore(record, seconds)
        self.log_probs, self.answers = list(record["log_probs"]), list(record["answers"])

    def result(self) -> dict[str, Any]:
        base = super().result()
        if not self.held_out_items or len(self.log_probs) < 2:
            return base
        end = len(self.log_probs) - 1
        steps = [self._change(t, t + 1) for t in range(end)]
        nll, exact = (self._nll(0), self._nll(end)), (self._exact(0), self._exact(end))
        items: dict[str, list[float]] = {
            "target_reward": steps[-1],
            "target_kept": [float(value >= 0) for value in steps[-1]],
            "target_drift": self._change(0, end),
            "target_nll": nll[1],
            "nll_rise": [b - a for a, b in zip(*nll, strict=True)],
            "exact_match": exact[1],
            "exact_gain": [b - a for a, b in zip(*exact, strict=True)],
            "answer_tokens": [float(length) for length, _, _ in self.answers[end]],
            "unfinished": [float(not ended) for _, ended, _ in self.answers[end]],
        }
        values = {"least_reward": min(map(_mean, steps)), "distinct": self._distinct(end)}
        means: dict[str, float | None] = {name: _mean(one) for name, one in items.items()} | values
        return {
            **base,
            "benchmark": "self-play, held-out items",
            "metrics": {
                **base["metrics"],
                **{name: means[name] for name in METRICS if means[name] is not None},
            },
            "words": METRICS,
            "items": items,
        }

    def charts(self) -> list[LineChart]:
        """Return the held-out figures through the iterations."""
        if not self.held_out_items or len(self.log_probs) < 2:
            return []
        steps = [self._change(t, t + 1) for t in range(len(self.log_probs) - 1)]
        stages = range(len(self.log_probs))
        return [
            LineChart(
                "Target reward of held-out items",
                "How much likelier each iteration made held-out targets; below 0 they sink.",
                "iteration",
                "nats",
                {"target reward": [(t + 1.0, _mean(step)) for t, step in enumerate(steps)]},
            ),
            LineChart(
                "Held-out targets",
                "Negative log-likelihood of a target's token.",
                "iteration",
                "nats a token",
                {"target": [(float(t), _mean(self._nll(t))) for t in stages]},
            ),
            LineChart(
                "Exact answers",
                "Greedy answers to held-out prompts that are the target.",
                "iteration",
                "share",
                {"exact match": [(float(t), _mean(self._exact(t))) for t in stages]},
            ),
        ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
