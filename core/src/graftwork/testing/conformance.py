"""The conformance kit: whether a plugin keeps the promises that users and other plugins rely on.

``trainer plugins check NAME`` runs :func:`check`; a test of a plugin's own may do so, too. What fails says what to do.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftwork.card import hooks_of, option_rows, provenance
from graftwork.console import Console
from graftwork.errors import UserError
from graftwork.plugins import PluginInfo, Plugins, construct, find, load_class, options_class
from graftwork.recipe import load
from graftwork.recipes import shipped
from graftwork.testing.runs import call_trainer

Verdict = Literal["passed", "failed", "does not apply"]
IMPORT_SECONDS = 0.5
"""What a plugin's own modules may take to be imported, without the libraries that they import."""
_BEYOND = {"ge": -1, "gt": 0, "le": 1, "lt": 0}
"""By how much a bound is overstepped by the nearest whole number that it refuses."""


@dataclass(frozen=True)
class Check:
    """What came out of one promise: its name, the verdict, and what to do about it where it failed."""

    name: str
    verdict: Verdict
    detail: str = ""


class _Failed(Exception):
    """A promise is not kept; the text says what to do."""


class _Without(Exception):
    """A promise is about something that the plugin does not have."""


def check(name: str, folder: Path, *, static: bool = False, console: Console | None = None) -> list[Check]:
    """Return a verdict for every promise.

    Args:
        name: of an installed plugin.
        folder: where runs of its smoke recipe are made.
        static: leave out what runs a model.
        console: shows a bar.

    Raises:
        UserError: the plugin is not installed.
    """
    info = find(name)
    promises = [*_STATIC, *(() if static else _RUNNING)]
    found: list[Check] = []
    with (console or Console(enabled=False)).bar(len(promises), f"check {name}", "check") as bar:
        for title, promise in promises:
            found.append(_verdict(title, lambda promise=promise: promise(info, folder)))
            bar.update(1)
    return found


def _verdict(title: str, promise: Callable[[], str | None]) -> Check:
    try:
        return Check(title, "passed", promise() or "")
    except _Without as reason:
        return Check(title, "does not apply", str(reason))
    except (_Failed, UserError) as reason:
        return Check(title, "failed", str(reason))


# ---------------------------------------------------------------------- what needs no model


def _metadata(info: PluginInfo, folder: Path) -> None:
    about = importlib.metadata.metadata(info.distribution)
    if not about["Summary"]:
        raise _Failed("the package has no summary; write `description` in its pyproject.toml")
    needs = importlib.metadata.requires(info.distribution) or []
    core = [re.sub(r"\s", "", need) for need in needs if re.match(r"graftwork\s*([<>=!~;\[]|$)", need)]
    if not core:
        raise _Failed(
            'the package does not depend on graftwork; add "graftwork>=0.1,<0.2" to its dependencies'
        )
    if "<" not in core[0] and "~=" not in core[0] and "==" not in core[0]:
        raise _Failed(f'"{core[0]}" takes any later graftwork, whose hooks may differ; add an upper bound')


def _readme(info: PluginInfo, folder: Path) -> None:
    about: Any = importlib.metadata.metadata(info.distribution)
    if not str(about.get_payload() or about.get("Description", "")).strip():
        raise _Failed('the package carries no README; write `readme = "README.md"` in its pyproject.toml')
    if not provenance(info):
        raise _Failed(
            "the README has no table headed `| part | comes from |`: say what is the paper's and what is yours"
        )


_IMPORT = """
import contextlib, io, sys
told = io.StringIO()
with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
    import {module}
sys.exit(3 if told.getvalue().strip() else 0)
"""


def _imports(info: PluginInfo, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", _IMPORT.format(module=info.module)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 3:
        raise _Failed("importing it prints; say things through `run.console` in a hook")
    if done.returncode:
        raise _Failed(f"importing it alone ends with {done.stderr.strip().splitlines()[-1]}")
    package = info.module.partition(".")[0]
    own = 0
    for line in done.stderr.splitlines():
        parts = re.fullmatch(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", line)
        if parts and parts[2].partition(".")[0] == package:
            own += int(parts[1])
    if own > IMPORT_SECONDS * 1e6:
        raise _Failed(
            f"its own modules take {own / 1e6:.2f} s to be imported, where {IMPORT_SECONDS} s is the most; move work "
            f"from the modules into hooks"
        )
    return f"{own / 1000:.0f} ms of its own"


def _class(info: PluginInfo, folder: Path) -> str:
    plugin_class = load_class(info.name)
    if not (plugin_class.__doc__ or "").strip():
        raise _Failed("its class has no docstring; the first line is shown by `trainer plugins show`")
    hooks = hooks_of(plugin_class)
    if not hooks:
        raise _Failed("its class implements no hook; see graftwork.hookspecs")
    return ", ".join(hooks)


def _options(info: PluginInfo, folder: Path) -> str:
    model = options_class(load_class(info.name))
    if model.model_config.get("extra") != "forbid":
        raise _Failed('its Options take unknown keys; set model_config = ConfigDict(extra="forbid")')
    rows = list(option_rows(model))
    silent = [row["name"] for row in rows if not row["help"]]
    if silent:
        raise _Failed(f"option '{silent[0]}' has no description; `trainer plugins show` shows it")
    return f"{len(rows)} options"


def _defaults(info: PluginInfo, folder: Path) -> None:
    required = [row["name"] for row in option_rows(options_class(load_class(info.name))) if row["required"]]
    if required:
        raise _Without(f"'{required[0]}' has no default")
    Plugins({info.name: construct(info.name, {})})


def _bad_options(info: PluginInfo, folder: Path) -> str:
    model = options_class(load_class(info.name))
    wrong: list[tuple[str, Any]] = [("no-such-option", 1)]
    for field, details in model.model_fields.items():
        for bound in details.metadata:
            for attribute, step in _BEYOND.items():
                limit = getattr(bound, attribute, None)
                if isinstance(limit, int | float):
                    wrong.append((field, limit + step))
    for field, value in wrong:
        try:
            construct(info.name, {field: value})
        except UserError:
            continue
        raise _Failed(f"option '{field}' takes {value!r}, which its bounds refuse")
    return f"{len(wrong)} refused"


def _recipes(info: PluginInfo, folder: Path) -> str:
    names = []
    for name, path in shipped(info).items():
        # The first is the one that is run where none is named.
        expanded = [load(path, size=size) for size in _sizes(path) or [None]]
        names.append(f"{info.name}:{name} ({len(expanded[0].jobs)} jobs)")
    if not names:
        raise _Failed(f"it ships no recipe; put one at {info.module.partition('.')[0]}/recipes/claim.yaml")
    return ", ".join(names)


# ---------------------------------------------------------------------- what runs its smoke recipe


def _sizes(path: Path) -> dict[str, Any]:
    from graftwork.yaml_lines import read

    return read(path).data.get("sizes") or {}


def _smoke(info: PluginInfo) -> tuple[str, list[str]]:
    """Return the shortest smoke recipe in which the plugin takes part, and the steps that it needs."""
    found: list[tuple[int, str, list[str]]] = []
    for name, path in shipped(info).items():
        sizes = _sizes(path)
        if sizes and "smoke" not in sizes:
            continue
        recipe = load(path, size="smoke" if sizes else None)
        mine = [spec for spec in recipe.jobs if info.name in spec.job.plugins]
        if not mine:
            continue
        wanted: list[str] = []
        _with_needs(mine[0].arm, {spec.arm: spec.needs for spec in recipe.jobs}, wanted)
        found.append((len(wanted), f"{info.name}:{name}", wanted))
    if not found:
        raise _Failed(
            "no recipe that it ships uses it at size smoke; one of seconds is what others try it with"
        )
    _, reference, steps = min(found)
    return reference, steps


def _with_needs(arm: str, needs: dict[str, tuple[str, ...]], wanted: list[str]) -> None:
    for earlier in needs[arm]:
        _with_needs(earlier, needs, wanted)
    if arm not in wanted:
        wanted.append(arm)


def _words(info: PluginInfo, output: Path, *more: str) -> list[str]:
    reference, steps = _smoke(info)
    chosen = [f"--step={step}" for step in steps]
    return ["run", reference, "--size=smoke", *chosen, f"--output={output}", *more]


def _ran(words: Sequence[str]) -> None:
    done = call_trainer(words)
    # 1: a claim did not hold, which at size smoke says nothing.
    if done.returncode not in (0, 1) or "Traceback" in done.stderr:
        told = [line for line in done.stderr.splitlines() if line.strip()]
        raise _Failed(f"`trainer {' '.join(words)}` ends with: {told[-1] if told else 'nothing said'}")


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


def _runs(info: PluginInfo, folder: Path) -> str:
    output = folder / "first"
    _ran(_words(info, output))
    numbers = _results(output)
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]
    if bad:
        raise _Failed(f"'{bad[0]}' is not finite at size smoke; a smoke run must be one that can be read")
    if not (output / "report.html").is_file() and not list(output.rglob("report.html")):
        raise _Failed("the run wrote no report.html")
    return f"{len(numbers)} numbers, all finite"


def _repeats(info: PluginInfo, folder: Path) -> str:
    first = folder / "first"
    if not _results(first):
        raise _Without("the first run did not come to an end")
    _ran(_words(info, folder / "second"))
    before, after = _results(first), _results(folder / "second")
    changed = [name for name in before if before[name] != after.get(name)]
    if changed:
        raise _Failed(
            f"'{changed[0]}' was {before[changed[0]]!r} and is {after.get(changed[0])!r} with the same seed; draw from "
            f"a generator that is seeded with run.seed"
        )
    return "bit for bit"


def _resumes(info: PluginInfo, folder: Path) -> str:
    first = folder / "first"
    if not _results(first):
        raise _Without("the first run did not come to an end")
    before = {path: path.stat().st_mtime_ns for path in first.rglob("result.json")}
    _ran(_words(info, first, "--resume"))
    if {path: path.stat().st_mtime_ns for path in first.rglob("result.json")} != before:
        raise _Failed("--resume of a finished run does its work again")
    return "a finished run is left alone"


_STATIC: tuple[tuple[str, Callable[[PluginInfo, Path], str | None]], ...] = (
    ("package's metadata", _metadata),
    ("README and provenance", _readme),
    ("cost of the import", _imports),
    ("class and hooks", _class),
    ("options", _options),
    ("defaults", _defaults),
    ("bad options", _bad_options),
    ("recipes", _recipes),
)
_RUNNING: tuple[tuple[str, Callable[[PluginInfo, Path], str | None]], ...] = (
    ("smoke run", _runs),
    ("same seed, same numbers", _repeats),
    ("resume", _resumes),
)
