"""Build the wheel of the frozen plugin, and write down the hooks that it was built against. `make freeze`.

Both are kept in the repository and are made once for each HOOKS_VERSION: what exists already is not made again.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from graftwork import hookspecs
from graftwork.data.layouts import RawTask
from graftwork.data.tasks import Task

HERE = Path(__file__).parent


def wheel(version: str = hookspecs.HOOKS_VERSION) -> Path:
    """Return where the wheel that was built against a version of the hooks is kept."""
    return HERE / f"graftwork_frozen-{version}-py3-none-any.whl"


def written(version: str = hookspecs.HOOKS_VERSION) -> Path:
    """Return where the hooks of a version are written down."""
    return HERE / f"surface-{version}.json"


def surface() -> dict[str, Any]:
    """Return the hooks with their arguments, and the classes that they take or return with their fields, of now."""
    hooks = {
        name: [argument for argument in inspect.signature(function).parameters if argument != "self"]
        for name, function in vars(hookspecs.GraftworkHooks).items()
        if not name.startswith("_")
    }
    classes = [one for one in vars(hookspecs).values() if dataclasses.is_dataclass(one)]
    fields = {
        one.__name__: [field.name for field in dataclasses.fields(one)] for one in (*classes, RawTask, Task)
    }
    return {"version": hookspecs.HOOKS_VERSION, "hooks": hooks, "classes": fields}


def main() -> int:
    """Freeze the present version; return the exit code."""
    existing = [path for path in (wheel(), written()) if path.exists()]
    if existing:
        print(
            f"error: {existing[0].name} exists: hooks {hookspecs.HOOKS_VERSION} are frozen; raise HOOKS_VERSION and "
            f"the version of tests/frozen/source first",
            file=sys.stderr,
        )
        return 2
    project = tomllib.loads((HERE / "source/pyproject.toml").read_text(encoding="utf-8"))["project"]
    if project["version"] != hookspecs.HOOKS_VERSION:
        print(
            f"error: tests/frozen/source has version {project['version']}, and the hooks have "
            f"{hookspecs.HOOKS_VERSION}; make them the same",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(HERE / "source")]
        subprocess.run(command, check=True)
        (built,) = Path(folder).glob("*.whl")
        wheel().write_bytes(built.read_bytes())
    written().write_text(json.dumps(surface(), indent=1) + "\n", encoding="utf-8")
    print(f"froze hooks {hookspecs.HOOKS_VERSION}: {wheel().name}, {written().name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
