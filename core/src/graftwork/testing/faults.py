"""Kill ``trainer`` at random moments, let it go on, and compare all that it leaves with an undisturbed run.

``python -m graftwork.testing.faults WORKLOADS --kills 40 --seed 0`` prints a table of all kills and
``kills survived/tried``; its exit code is 1 where one was not survived.

WORKLOADS is a YAML file of commands by name::

    train: train --model {model} --data {stream} --output {output}/run --set train.max_steps=4

The words in braces are places: ``{output}`` is an empty folder, compared afterwards; ``{here}`` is the folder of the
file; the others are small inputs, made once: see :func:`make_inputs`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from graftwork.console import Console
from graftwork.testing.processes import Cold, Started, Starter, warm
from graftwork.testing.same import differences, unfinished

IN_A_ROW = 3
"""So many kills at most before a run may finish."""
SOON = 0.05
"""Seconds: within so many a process is killed after the file that was waited for."""
POLL = 0.005
_RANDOM = re.compile(r"-[0-9a-f]{8}\.part")


@dataclass(frozen=True)
class Workload:
    """A command to be killed: its name and its words after ``trainer``, with places in braces."""

    name: str
    words: tuple[str, ...]

    def filled(self, places: Mapping[str, Path]) -> list[str]:
        """Return the words with places put in."""
        return [word.format_map(places) for word in self.words]


@dataclass
class Kill:
    """One kill and what came of it.

    Attributes:
        workload: the name of the command.
        when: seconds since the process was started.
        newest: the newest file that stood there, from the output folder.
        resumed: whether the run went on to its end afterwards.
        different: what differs from the undisturbed run then; empty for nothing.
    """

    workload: str
    when: float
    newest: str
    resumed: bool = False
    different: list[str] = field(default_factory=list)

    @property
    def survived(self) -> bool:
        return self.resumed and not self.different


class Harness:
    """Kills one workload after the other; everything lies below ``folder``.

    Args:
        workloads: the commands.
        folder: an empty one.
        seed: of all moments.
        starter: what starts processes.
        here: the place of that name.
    """

    def __init__(
        self, workloads: Sequence[Workload], folder: Path, *, seed: int, starter: Starter, here: Path
    ) -> None:
        self.workloads = list(workloads)
        self.folder = folder
        self.seed = seed
        self.starter = starter
        self.places = {**make_inputs(folder / "inputs"), "here": here}
        self._whole: dict[str, tuple[float, list[str]]] = {}

    def kills(self, count: int) -> Iterator[Kill]:
        """Yield ``count`` kills, dealt out to the workloads in turn, when the run of each has ended.

        Half of the moments are drawn evenly over the time of an undisturbed run, half as a file that it makes.
        """
        shares = [count // len(self.workloads)] * len(self.workloads)
        for number in range(count % len(self.workloads)):
            shares[number] += 1
        for workload, share in zip(self.workloads, shares, strict=True):
            draw = random.Random(f"{self.seed}:{workload.name}")
            left = share
            while left:
                kills = self._round(workload, draw, min(left, draw.randint(1, IN_A_ROW)))
                left -= len(kills)
                yield from kills

    def whole(self, workload: Workload) -> tuple[float, list[str]]:
        """Return how long an undisturbed run takes (seconds) and the files that came up in it, in order.

        Raises:
            RuntimeError: it failed.
        """
        if workload.name not in self._whole:
            process, started = self._start(workload, resume=False)
            seen: dict[str, None] = {}
            while process.poll() is None:
                seen |= dict.fromkeys(self._there(workload))
                # Looking takes time from what is timed.
                time.sleep(4 * POLL)
            took = time.monotonic() - started
            if process.poll() != 0:
                raise RuntimeError(f"{workload.name} fails undisturbed: {process.said()[-2000:]}")
            self._place(workload).rename(self._place(workload, "whole"))
            self._whole[workload.name] = took, list(seen)
        return self._whole[workload.name]

    def _round(self, workload: Workload, draw: random.Random, wanted: int) -> list[Kill]:
        """Kill a new run up to ``wanted`` times, let it end and compare it; none where it was over too soon."""
        took, files = self.whole(workload)
        shutil.rmtree(self._place(workload), ignore_errors=True)
        kills: list[Kill] = []
        process, started = self._start(workload, resume=False)
        for _ in range(wanted):
            there = self._there(workload)
            still = [name for name in files if name not in there]
            file = draw.choice(still) if still and draw.random() < 0.5 else None
            delay = draw.uniform(0, took if file is None else SOON)
            if not self._wait(process, workload, file, delay):
                break
            process.send(signal.SIGKILL)
            process.wait()
            kills.append(Kill(workload.name, time.monotonic() - started, self._newest(workload)))
            process, started = self._start(workload, resume=True)
        code = process.wait()
        different = [f"exit code {code}: {_last_line(process)}"] if code else self._compared(workload)
        for kill in kills:
            kill.resumed, kill.different = code == 0, different
        return kills

    def _wait(self, process: Started, workload: Workload, file: str | None, delay: float) -> bool:
        """Wait for a file (where one is named), then for ``delay`` seconds; return whether the process runs still."""
        while file is not None and not self._appeared(workload, file):
            if process.poll() is not None:
                return False
            time.sleep(POLL)
        deadline = time.monotonic() + delay
        while (left := deadline - time.monotonic()) > 0 and process.poll() is None:
            time.sleep(min(left, 0.005))
        return process.poll() is None

    def _start(self, workload: Workload, *, resume: bool) -> tuple[Started, float]:
        place = self._place(workload)
        (place / "output").mkdir(parents=True, exist_ok=True)
        words = workload.filled({**self.places, "output": place / "output"})
        env = {"GRAFTWORK_CACHE": str(place / "cache")}
        log = self.folder / f"{workload.name}.log"
        started = time.monotonic()
        return self.starter.start([*words, *(["--resume"] if resume else [])], log, env=env), started

    def _compared(self, workload: Workload) -> list[str]:
        whole, now = self._place(workload, "whole"), self._place(workload)
        found = differences(whole / "output", now / "output")
        return found + [f"the cache holds '{name}' still" for name in unfinished(now / "cache")]

    def _place(self, workload: Workload, name: str = "now") -> Path:
        # Always the same one while it is written: paths stand in manifests.
        return self.folder / workload.name / name

    def _there(self, workload: Workload) -> list[str]:
        """Return the names of all files and folders of a run, without what is random in them."""
        place = self._place(workload)
        found: list[str] = []
        for folder, folders, files in os.walk(place):
            inside = os.path.relpath(folder, place)
            found += [_RANDOM.sub("-*.part", os.path.join(inside, name)) for name in (*folders, *files)]
        return found

    def _appeared(self, workload: Workload, file: str) -> bool:
        place = self._place(workload) / file
        # Names with something random in them are patterns.
        return any(place.parent.glob(place.name)) if "*" in file else place.exists()

    def _newest(self, workload: Workload) -> str:
        newest, when = "nothing", 0.0
        for path in self._place(workload).rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_file() and (changed := path.stat().st_mtime) >= when:
                    newest, when = str(path.relative_to(self._place(workload))), changed
        return newest


def make_inputs(folder: Path) -> dict[str, Path]:
    """Make small inputs below ``folder`` and return them by name.

    ``model`` is a checkpoint of four layers, ``large`` one of ``model``'s kind whose layers do something, ``expert_a``
    and ``expert_b`` fine-tunes of ``model``; ``stream`` holds two tasks, ``sums`` prompts with one answer each,
    ``prompts`` 24 lines for ``trainer generate``, ``edits`` two edits.
    """
    from graftwork.edit.layouts import write_requests
    from graftwork.testing.data import tiny_stream, tiny_sums
    from graftwork.testing.editing import REQUESTS, editable_model
    from graftwork.testing.experts import save_tiny, tiny_experts

    base, experts = tiny_experts(folder, ("a", "b"), num_hidden_layers=4)
    write_requests(folder / "edits.jsonl", REQUESTS)
    lines = [json.dumps({"prompt": f"{'again ' * (number % 5)}{number}"}) for number in range(24)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "model": base,
        **{f"expert_{name}": Path(ref) for name, ref in experts.items()},
        "large": save_tiny(editable_model(), folder / "large"),
        "stream": tiny_stream(folder / "stream", ("fruit", "colour"), train=32, test=8),
        "sums": tiny_sums(folder / "sums"),
        "prompts": folder / "prompts.jsonl",
        "edits": folder / "edits.jsonl",
    }


def read_workloads(path: Path, names: Sequence[str] = ()) -> list[Workload]:
    """Return the workloads in a YAML file, or those of them that are named.

    Raises:
        ValueError: it is no such file, or it has none of that name.
    """
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not all(isinstance(words, str) for words in found.values()):
        raise ValueError(f"'{path}' does not hold commands by name")
    for name in names:
        if name not in found:
            raise ValueError(f"'{path}' has no command '{name}' (it has: {', '.join(found)})")
    return [
        Workload(name, tuple(shlex.split(words)))
        for name, words in found.items()
        if not names or name in names
    ]


def table(kills: Sequence[Kill]) -> str:
    """Return all kills as a table, and how many were survived."""
    rows = [("command", "killed after", "newest file then", "resumed", "equal")]
    for kill in kills:
        equal = "yes" if kill.survived else "no: " + "; ".join(kill.different[:3])
        rows.append(
            (kill.workload, f"{kill.when:.2f} s", kill.newest, "yes" if kill.resumed else "no", equal)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    ]
    return "\n".join([*lines, f"kills survived/tried: {sum(kill.survived for kill in kills)}/{len(kills)}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 where all kills were survived, else 1."""
    parser = argparse.ArgumentParser("python -m graftwork.testing.faults", description=__doc__)
    parser.add_argument("workloads", type=Path, help="YAML file of commands by name")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="repeatable")
    parser.add_argument(
        "--folder", type=Path, help="an empty folder to work in, which stays  [default: one that goes]"
    )
    parser.add_argument("--warm", action="store_true", help="processes are forked, with all imports done")
    given = parser.parse_args(arguments)
    workloads = read_workloads(given.workloads, given.only)
    kills: list[Kill] = []
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        starter = stack.enter_context(warm()) if given.warm else Cold()
        here = given.workloads.resolve().parent
        harness = Harness(workloads, folder, seed=given.seed, starter=starter, here=here)
        with Console().bar(given.kills, "faults", "kill") as bar:
            for kill in harness.kills(given.kills):
                kills.append(kill)
                bar.set_postfix_str(kill.workload)
                bar.update(1)
    print(table(kills))
    return 0 if all(kill.survived for kill in kills) else 1


def _last_line(process: Started) -> str:
    lines = [line for line in re.split(r"[\r\n]+", process.said()) if line.strip()]
    lines = [line for line in lines if line.startswith("error: ")] or lines
    return lines[-1].strip() if lines else "it said nothing"


if __name__ == "__main__":
    sys.exit(main())
