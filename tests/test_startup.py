"""The command line starts without the heavy libraries and without a plugin's code."""

from __future__ import annotations

import subprocess
import sys

import pytest

# The peers and anything that brings them; numpy because it alone costs as much as the whole start.
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "pydantic"}
LOADED = """
import sys
from graftwork.cli import main
try:
    main({arguments!r})
finally:
    print(*sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["plugins", "list"]])
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    program = LOADED.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "graftwork" in loaded
    assert not loaded & HEAVY
    assert not {name for name in loaded if name.startswith("graftwork_")}
