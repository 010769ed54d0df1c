"""Promises that need no model: metadata, README, import, class, options, recipes."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from typing import Any

from graftwork.card import hooks_of, option_rows, provenance
from graftwork.errors import UserError
from graftwork.plugins import Plugins, construct, load_class, options_class
from graftwork.recipe import load
from graftwork.recipes import shipped
from graftwork.testing.conformance.trial import Failed, Promise, Trial, Without
from graftwork.testing.smoke import sizes_of

IMPORT_SECONDS = 0.5
"""What a plugin's own modules may take to be imported, without the libraries that they import."""
_BEYOND = {"ge": -1, "gt": 0, "le": 1, "lt": 0}
"""By how much a bound is overstepped by the nearest whole number that it refuses."""


def _metadata(trial: Trial) -> None:
    about = importlib.metadata.metadata(trial.info.distribution)
    if not about["Summary"]:
        raise Failed("the package has no summary; write `description` in its pyproject.toml")
    needs = importlib.metadata.requires(trial.info.distribution) or []
    core = [re.sub(r"\s", "", need) for need in needs if re.match(r"graftwork\s*([<>=!~;\[]|$)", need)]
    if not core:
        raise Failed(
            'the package does not depend on graftwork; add "graftwork>=0.1,<0.2" to its dependencies'
        )
    if "<" not in core[0] and "~=" not in core[0] and "==" not in core[0]:
        raise Failed(f'"{core[0]}" takes any later graftwork, whose hooks may differ; add an upper bound')


def _readme(trial: Trial) -> None:
    about: Any = importlib.metadata.metadata(trial.info.distribution)
    if not str(about.get_payload() or about.get("Description", "")).strip():
        raise Failed('the package carries no README; write `readme = "README.md"` in its pyproject.toml')
    if not provenance(trial.info):
        raise Failed(
            "the README has no table headed `| part | comes from |`: say what is the paper's and what is yours"
        )


_IMPORT = """
import contextlib, io, sys
told = io.StringIO()
with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
    import {module}
sys.exit(3 if told.getvalue().strip() else 0)
"""


def _imports(trial: Trial) -> str:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", _IMPORT.format(module=trial.info.module)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 3:
        raise Failed("importing it prints; say things through `run.console` in a hook")
    if done.returncode:
        raise Failed(f"importing it alone ends with {done.stderr.strip().splitlines()[-1]}")
    package = trial.info.module.partition(".")[0]
    own = 0
    for line in done.stderr.splitlines():
        parts = re.fullmatch(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", line)
        if parts and parts[2].partition(".")[0] == package:
            own += int(parts[1])
    if own > IMPORT_SECONDS * 1e6:
        raise Failed(
            f"its own modules take {own / 1e6:.2f} s to be imported, where {IMPORT_SECONDS} s is the most; move work "
            f"from the modules into hooks"
        )
    return f"{own / 1000:.0f} ms of its own"


def _class(trial: Trial) -> str:
    plugin_class = load_class(trial.info.name)
    if not (plugin_class.__doc__ or "").strip():
        raise Failed("its class has no docstring; the first line is shown by `trainer plugins show`")
    hooks = hooks_of(plugin_class)
    if not hooks:
        raise Failed("its class implements no hook; see graftwork.hookspecs")
    return ", ".join(hooks)


def _options(trial: Trial) -> str:
    model = options_class(load_class(trial.info.name))
    if model.model_config.get("extra") != "forbid":
        raise Failed('its Options take unknown keys; set model_config = ConfigDict(extra="forbid")')
    rows = list(option_rows(model))
    silent = [row["name"] for row in rows if not row["help"]]
    if silent:
        raise Failed(f"option '{silent[0]}' has no description; `trainer plugins show` shows it")
    return f"{len(rows)} options"


def _defaults(trial: Trial) -> None:
    required = [
        row["name"] for row in option_rows(options_class(load_class(trial.info.name))) if row["required"]
    ]
    if required:
        raise Without(f"'{required[0]}' has no default")
    Plugins({trial.info.name: construct(trial.info.name, {})})


def _bad_options(trial: Trial) -> str:
    model = options_class(load_class(trial.info.name))
    wrong: list[tuple[str, Any]] = [("no-such-option", 1)]
    for field, details in model.model_fields.items():
        for bound in details.metadata:
            for attribute, step in _BEYOND.items():
                limit = getattr(bound, attribute, None)
                if isinstance(limit, int | float):
                    wrong.append((field, limit + step))
    for field, value in wrong:
        try:
            construct(trial.info.name, {field: value})
        except UserError:
            continue
        raise Failed(f"option '{field}' takes {value!r}, which its bounds refuse")
    return f"{len(wrong)} refused"


def _recipes(trial: Trial) -> str:
    names = []
    for name, path in shipped(trial.info).items():
        # The first is the one that is run where none is named.
        expanded = [load(path, size=size) for size in sizes_of(path) or [None]]
        names.append(f"{trial.info.name}:{name} ({len(expanded[0].jobs)} jobs)")
    if not names:
        raise Failed(
            f"it ships no recipe; put one at {trial.info.module.partition('.')[0]}/recipes/claim.yaml"
        )
    return ", ".join(names)


STATIC: tuple[tuple[str, Promise], ...] = (
    ("package's metadata", _metadata),
    ("README and provenance", _readme),
    ("cost of the import", _imports),
    ("class and hooks", _class),
    ("options", _options),
    ("defaults", _defaults),
    ("bad options", _bad_options),
    ("recipes", _recipes),
)
