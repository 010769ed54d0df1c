"""Self-play as a stream: every iteration is a task whose pairs are made just before it is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset

from graftwork.data.tasks import Task
from graftwork.distributed import barrier
from graftwork.errors import PluginError, UserError
from graftwork.evaluate.encoding import pad_token
from graftwork.files import atomic_folder, write_json_atomic
from graftwork.generate.stopping import end_tokens
from graftwork.hookspecs import LineChart, SelfPlay
from graftwork.recipe import Job, JobSpec
from graftwork.run import Run
from graftwork.self_play.held_out import HeldOut
from graftwork.self_play.items import Item, encode_items, text_of
from graftwork.self_play.pairs import Pair, load_pairs, pair_up, save_pairs
from graftwork.self_play.players import Bench, Player, Team
from graftwork.self_play.scoring import LogProbs, Scorer
from graftwork.self_play.writing import BatchedWriter, Round, Writer, write_round
from graftwork.train.checkpoints import read_json, stage_folder
from graftwork.train.interference import Updates
from graftwork.train.stream import Stream

if TYPE_CHECKING:
    from graftwork.train.job import Plan

START = "start"
NOTES = "notes.json"


def iterations_of(task: Task, count: int) -> list[Task]:
    """Return ``count`` tasks on the data of ``task``, one per iteration; what is held out is measured apart."""
    return [
        dataclasses.replace(
            task,
            name=f"iteration-{k + 1}",
            test=None,
            index=k,
            total=count,
            notes=task.notes if k == 0 else [],
        )
        for k in range(count)
    ]


def only_task(tasks: Sequence[Task]) -> Task:
    """Return the one task that self-play learns.

    Raises:
        UserError: there are several, or its items are no prompts with answers, or one is empty.
    """
    if len(tasks) != 1:
        names = ", ".join(task.name for task in tasks)
        raise UserError(
            f"self-play learns one task in iterations, and the data has {len(tasks)} ({names}); choose one with "
            f"data.order"
        )
    columns = tasks[0].train.column_names
    for key in ("prompt", "completion"):
        if key not in columns:
            raise UserError(
                f"task '{tasks[0].name}' has no '{key}' (it has: {', '.join(columns)}); self-play learns from "
                f"prompts with answers"
            )
    for index, answer in enumerate(tasks[0].train["completion"]):
        if not text_of(answer):
            raise UserError(
                f"task '{tasks[0].name}', training item {index}: the answer is empty; self-play learns from prompts "
                f"with answers"
            )
    return tasks[0]


def scorer_for(run: Run, tokenizer: Any, train: dict[str, Any], play: SelfPlay) -> Scorer:
    """Return what scores answers as this job's training does."""
    precision = torch.bfloat16 if train.get("bf16") else torch.float16 if train.get("fp16") else None
    size = int(train.get("per_device_eval_batch_size", 8))
    return Scorer(
        run,
        pad=pad_token(tokenizer),
        batch_size=size,
        precision=precision,
        token_log_probs=play.token_log_probs,
    )


def held_out_items(job: Job, task: Task, tokenizer: Any) -> list[Item]:
    """Return the test items as tokens; none where the task has no test items."""
    if task.test is None:
        return []
    items, notes = encode_items(
        cast(Any, task.test),
        tokenizer,
        max_length=_max_length(job.train),
        what=f"test items of '{task.name}'",
    )
    task.notes.extend(notes)
    return items


class SelfPlayStream(Stream):
    """Write, score, pair, compare with the team, train; every phase is kept and not done again on resuming."""

    def __init__(
        self,
        spec: JobSpec,
        run: Run,
        plan: Plan,
        tasks: list[Task],
        *,
        play: SelfPlay,
        owner: str,
        held_out: HeldOut,
    ) -> None:
        super().__init__(spec, run, plan, tasks, held_out, run.console)
        self.play = play
        self.owner = owner
        self.held_out = held_out
        self.kept_models = max(play.players, 1)
        self.rounds_folder = self.run.directory / "rounds"
        self.max_length = _max_length(self.job.train)
        # A sketch of updates tells how tasks disturb each other; iterations are one task.
        self.updates = Updates(False)
        self._items: list[Item] | None = None
        self._known: Team | None = None

    # ------------------------------------------------------------------ the data of an iteration

    def dataset(self, task: Task) -> Dataset:
        """Return the pairs of the iteration, made now or found complete."""
        path = self.rounds_folder / task.name / "pairs.parquet"
        with self._statistics():
            self._read_items(task)
            team = self._team(task.index)
            if not path.exists():
                self._make_pairs(task, team, path)
        task.notes.extend((read_json(path.with_name(NOTES)) or {}).get("notes", []))
        return load_pairs(path)

    def _read_items(self, task: Task) -> None:
        if self._items is not None:
            return
        self._items, notes = encode_items(
            cast(Any, super().dataset(task)),
            self.tokenizer,
            max_length=self.max_length,
            what=f"training items of '{self.job.data.source}'",
        )
        if task.index == 0:
            task.notes.extend(notes)
            for note in notes:
                self.console.say(f"note: {note}")

    def _make_pairs(self, task: Task, team: Team, path: Path) -> None:
        assert self._items is not None
        newest = team.last(1)[0]
        players = team.last(self.play.players)
        bench = Bench(self.stack, self.job.model)
        rounds = self._rounds(team, bench, newest)
        pairs, notes = pair_up(self._items, rounds, self.play, self.owner, self.max_length)
        chosen, rejected = self._references(players, newest, rounds, pairs, bench)
        notes = [f"{task.name}: {note}" for note in [*notes, *self._inspected(chosen, rejected)]]
        for note in notes:
            self.console.say(f"note: {note}")
        if self.run.main:
            write_json_atomic(path.with_name(NOTES), {"notes": notes})
            save_pairs(path, pairs, chosen, rejected)
        barrier()

    def _rounds(self, team: Team, bench: Bench, newest: Player) -> list[Round]:
        """Return the answers of the last players, the oldest first."""
        assert self._items is not None
        writers = team.last(self.play.rounds)[::-1] if self.play.samples else []
        found = []
        with bench.seated(self._missing(writers), newest) as seat:
            for player in writers:
                found.append(
                    write_round(
                        self.rounds_folder / player.name,
                        self.run,
                        self.play,
                        player,
                        self._items,
                        writer=self._writer(),
                        seat=lambda player=player: seat(player),
                        ends=end_tokens(self.stack.model, self.tokenizer),
                    )
                )
            seat(newest)
        return found

    def _missing(self, players: Sequence[Player]) -> list[Player]:
        return [
            player
            for player in players
            if not (self.rounds_folder / player.name / "samples.parquet").exists()
        ]

    def _writer(self) -> Writer:
        options = self.play.options.writing
        if options.backend == "vllm":
            from graftwork.self_play.vllm import writer

            return writer(options, self.tokenizer)
        return BatchedWriter(self.run, self.tokenizer, options)

    def _references(
        self,
        players: Sequence[Player],
        newest: Player,
        rounds: Sequence[Round],
        pairs: Sequence[Pair],
        bench: Bench,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities (N x J) of both answers of every pair, each computed once a player."""
        if not rounds:
            nothing = torch.zeros(len(pairs), 0)
            return nothing, nothing
        groups = _groups(self._items or [], pairs)
        kept = LogProbs(
            self.rounds_folder / "log-probs",
            self.run,
            self.held_out.scorer,
        )
        wanted = {
            player: [name for name, one in groups.items() if not kept.has(player.checkpoint, one)]
            for player in players
        }
        with bench.seated([player for player in players if wanted[player]], newest) as seat:
            for player in players:
                if wanted[player]:
                    model = seat(player)
                    for name in wanted[player]:
                        kept.compute(player.checkpoint, groups[name], model, f"{player.name} scores {name}")
            seat(newest)
        columns: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for player in players:
            known: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
            for one in groups.values():
                values = kept.get(player.checkpoint, one).tolist()
                known.update(zip(map(_key, one), values, strict=True))
            for column, which in zip(columns, ("chosen", "rejected"), strict=True):
                column.append(
                    torch.tensor(
                        [known[_key((pair.item.prompt_ids, getattr(pair, which)))] for pair in pairs]
                    )
                )
        return torch.stack(columns[0], 1), torch.stack(columns[1], 1)

    def _inspected(self, chosen: torch.Tensor, rejected: torch.Tensor) -> list[str]:
        if self.play.inspect is None or not chosen.numel():
            return []
        try:
            return list(self.play.inspect(chosen, rejected))
        except Exception as error:
            raise PluginError(self.owner, "self_play (inspect)", error) from error

    # ------------------------------------------------------------------ players

    def _team(self, index: int) -> Team:
        """Return all players that there are before iteration ``index`` (from 0); each is looked at once."""
        if self._known is None:
            self._known = Team(self.rounds_folder, self.play.options.team)
            self._take_in_start(self._known, index)
        team = self._known
        there = {player.index for player in team.players}
        for number in range(1, index + 1):
            name = self.tasks[number - 1].name
            folder = stage_folder(self.run, number - 1, name) / "model"
            if number not in there and (number > index - self.kept_models or folder.exists()):
                team.add(number, name, folder)
        if self.run.main:
            team.write()
        return team

    def _take_in_start(self, team: Team, index: int) -> None:
        """Take in the model at the start; of an adapter, the state that it was made with."""
        if self.plan.adapter is not None:
            folder = self.rounds_folder / START / "model"
            if self.run.main and not folder.exists():
                with atomic_folder(folder) as building:
                    self.stack.save(building)
            barrier()
            team.add(0, START, folder)
        else:
            # Later on, what was noted of it counts: the model in memory has learned.
            team.add(0, START, None, weights=self.stack.model if index == 0 else None)

    # ------------------------------------------------------------------ training

    def _trainer(self, task: Task) -> Any:
        trainer = super()._trainer(task)
        trainer.begin(self.play, self.run, self.owner, task.index + 1)
        return trainer

    def _tell_lost_items(self, task: Task, given: int, kept: int) -> None:
        """Say nothing: what does not fit was told when the items were read."""

    def _more_results(self) -> dict[str, Any]:
        charts = [*self.held_out.charts(), *self._logged()]
        return {"lines": [dataclasses.asdict(chart) for chart in charts]}

    def _logged(self) -> list[LineChart]:
        """Return what the loss logged in all iterations, a chart per group."""
        groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
        before, last, task = 0, 0, None
        for event in self.run.events.read():
            if event["event"] != "log":
                continue
            if event["task"] != task:
                before, task = before + last, event["task"]
            last = event["step"]
            for key, value in event.items():
                group, slash, line = key.partition("/")
                if slash and group != "loss":
                    groups.setdefault(group, {}).setdefault(line, []).append((float(before + last), value))
        return [
            LineChart(group.capitalize(), "Means over the pairs of the steps.", "step", group, lines)
            for group, lines in groups.items()
        ]


def _groups(
    items: Sequence[Item], pairs: Sequence[Pair]
) -> dict[str, list[tuple[Sequence[int], Sequence[int]]]]:
    """Return the different answers in ``pairs``: all targets, and what each round adds, in a fixed order.

    A round's answers are the same in every iteration that it takes part in, so they are found again.
    """
    targets = {_key((item.prompt_ids, item.target_ids)) for item in items}
    groups: dict[str, dict[Any, tuple[Sequence[int], Sequence[int]]]] = {
        "targets": {key: key for key in sorted(targets)}
    }
    for pair in pairs:
        assert pair.round is not None
        for answer in (pair.chosen, pair.rejected):
            key = _key((pair.item.prompt_ids, answer))
            if key not in targets:
                groups.setdefault(f"answers of {pair.round.player.name}", {}).setdefault(key, key)
    return {name: list(one.values()) for name, one in groups.items()}


def _key(sequence: tuple[Sequence[int], Sequence[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(sequence[0]), tuple(sequence[1])


def _max_length(train: dict[str, Any]) -> int | None:
    """Return the trainer's limit on a sequence; DPOConfig's own where the recipe is silent."""
    return train.get("max_length", 1024)
