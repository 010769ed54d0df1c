"""Promises that run a model: the smoke recipe, and the plugin alone on a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from graftwork.plugins import PluginInfo
from graftwork.recipe import Job
from graftwork.testing.conformance.trial import Failed, Promise, Trial, Without
from graftwork.testing.smoke import smoke_recipes

KILLS = 3
"""How often each command of a plugin is killed."""
SEED = 0
SECONDS = 900
"""What a smoke recipe may take."""


# ---------------------------------------------------------------------- its smoke recipe


def _smoke(info: PluginInfo) -> tuple[str, list[str]]:
    """Return the shortest smoke recipe in which the plugin takes part, and the steps that it needs."""
    found: list[tuple[int, str, list[str]]] = []
    for name, recipe in smoke_recipes(info):
        mine = [spec for spec in recipe.jobs if _takes_part(info.name, spec.job)]
        if not mine:
            continue
        wanted: list[str] = []
        _with_needs(mine[0].arm, {spec.arm: spec.needs for spec in recipe.jobs}, wanted)
        found.append((len(wanted), f"{info.name}:{name}", wanted))
    if not found:
        raise Failed(
            "no recipe that it ships uses it at size smoke; one of seconds is what others try it with"
        )
    _, reference, steps = min(found)
    return reference, steps


def _takes_part(name: str, job: Job) -> bool:
    """Whether a job uses a plugin, or measures with a benchmark of its own."""
    benchmark = str((job.benchmark or {}).get("name", ""))
    return name in job.plugins or benchmark.startswith(f"{name}:")


def _with_needs(arm: str, needs: dict[str, tuple[str, ...]], wanted: list[str]) -> None:
    for earlier in needs[arm]:
        _with_needs(earlier, needs, wanted)
    if arm not in wanted:
        wanted.append(arm)


def _words(info: PluginInfo, output: Path, *more: str) -> list[str]:
    reference, steps = _smoke(info)
    chosen = [f"--step={step}" for step in steps]
    return ["run", reference, "--size=smoke", *chosen, f"--output={output}", *more]


def _ran(trial: Trial, words: Sequence[str]) -> None:
    done = trial.tools.starter.start(words, trial.folder / "smoke.log")
    done.wait(SECONDS)
    said = done.said()
    # 1: a claim did not hold, which at size smoke says nothing.
    if done.poll() not in (0, 1) or "Traceback" in said:
        told = [line for line in said.splitlines() if line.strip()]
        raise Failed(f"`trainer {' '.join(words)}` ends with: {told[-1] if told else 'nothing said'}")


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield the measured numbers of a result; times and memory are left out, and so is where it lies."""
    if isinstance(value, dict):
        for key, one in value.items():
            if not any(word in key for word in ("seconds", "memory", "bytes")):
                yield from _numbers(one, f"{path}.{key}")
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _numbers(one, f"{path}[{index}]")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def _results(output: Path) -> dict[str, float]:
    found = {}
    for path in sorted(output.rglob("result.json")):
        value = json.loads(path.read_text(encoding="utf-8"))
        for key in ("metrics", "scores", "items"):
            where = path.parent.relative_to(output).as_posix()
            found |= dict(_numbers(value.get(key) or {}, f"{where}.{key}"))
    return found


def _runs(trial: Trial) -> str:
    output = trial.folder / "smoke"
    _ran(trial, _words(trial.info, output))
    numbers = _results(output)
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]
    if bad:
        raise Failed(f"'{bad[0]}' is not finite at size smoke; a smoke run must be one that can be read")
    if not list(output.rglob("report.html")):
        raise Failed("the run wrote no report.html")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("result.json")}
    _ran(trial, _words(trial.info, output, "--resume"))
    if {path: path.stat().st_mtime_ns for path in output.rglob("result.json")} != before:
        raise Failed("--resume of a finished run does its work again")
    return f"{len(numbers)} numbers, all finite; left alone by --resume"


# ---------------------------------------------------------------------- alone on a tiny model


def _works(trial: Trial) -> str:
    outcome = trial.tools.composer.outcome([trial.name])
    if outcome.verdict != "composes":
        raise Failed(
            f"{outcome.detail}; options under which it works and shows on a random model of four layers belong into "
            f"the class attribute `tiny`"
        )
    stages = trial.tools.composer.shop.stages(trial.name)
    return f"{', '.join(stages) or 'measures only'}; what is read again is what was measured"


def _neutral(trial: Trial) -> str:
    from graftwork.testing.composition.compose import Composer
    from graftwork.testing.composition.parts import neutral_options

    options = neutral_options(trial.name)
    if options is None:
        raise Without("its class names no `neutral` options, at which it would change nothing")
    changed = Composer(trial.folder / "neutral", {trial.name: options}).from_plain(trial.name)
    if changed:
        raise Failed(
            f"with its `neutral` options the plain model's {', '.join(changed)} are not the same bits"
        )
    return "the plain model, bit for bit"


def _repeats(trial: Trial) -> str:
    changed = trial.tools.composer.again(trial.name)
    if changed:
        raise Failed(
            f"{', '.join(changed)} differ between two runs of the same seed; draw from a generator that is seeded with "
            f"run.seed"
        )
    return "bit for bit"


def _killed(trial: Trial) -> str:
    from graftwork.testing.faults import Harness, Workload

    stages = trial.tools.composer.shop.stages(trial.name)
    if not stages:
        raise Without("it takes part in no command that goes on after a kill")
    workloads = []
    for stage in stages:
        output = "{output}/answers.jsonl" if stage == "generate" else "{output}/run"
        words = [
            word.replace("{", "{{").replace("}", "}}")
            for word in trial.tools.composer.shop.words(trial.name, stage)
        ]
        workloads.append(Workload(stage, (*words, "--output", output)))
    harness = Harness(
        workloads, trial.folder / "kills", seed=SEED, starter=trial.tools.starter, here=trial.folder
    )
    try:
        kills = list(harness.kills(KILLS * len(workloads)))
    except RuntimeError as error:
        raise Failed(str(error)) from error
    lost = [kill for kill in kills if not kill.survived]
    if lost:
        what = "; ".join(lost[0].different[:2]) or "it does not go on"
        raise Failed(f"killed in {lost[0].workload} after {lost[0].when:.1f} s and resumed: {what}")
    return f"{len(kills)} of {len(kills)} kills survived"


def _two_processes(trial: Trial) -> str:
    from graftwork.testing.distributed import two_processes

    if "train" not in trial.tools.composer.shop.stages(trial.name):
        raise Without("it takes no part in training")
    try:
        found = two_processes(trial.tools.composer.shop.words(trial.name, "train"), trial.folder / "two")
    except AssertionError as error:
        raise Failed(f"two processes do not learn what one does: {error}") from error
    return f"losses within {found.largest.get('loss', 0.0):.0e} of one process's"


RUNNING: tuple[tuple[str, Promise], ...] = (
    ("smoke recipe", _runs),
    ("works, saved and read again", _works),
    ("neutral setting", _neutral),
    ("same seed, same bits", _repeats),
    ("killed and resumed", _killed),
    ("two processes", _two_processes),
)
