"""One process of a launch that does many jobs: ``python -m graftwork.testing.distributed_worker jobs.json``.

The file holds ``[[name, words of trainer], ...]``. The processes meet once and stay together over all jobs; the
Trainer's arguments begin every job with fresh states of accelerate's. The first job that fails ends the launch,
since the other processes may wait for this one inside of it. No report is rendered, which takes as long as training.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from graftwork.cli import train as command
from graftwork.console import Console
from graftwork.distributed import leave
from graftwork.recipe import expand
from graftwork.testing.distributed import shard_on_cpu
from graftwork.train.job import quiet_libraries, run_job
from graftwork.yaml_lines import Document


def work(listed: Path) -> None:
    """Do the jobs in ``listed``; the name of one that fails is left in ``failed``, beside it."""
    quiet_libraries()
    shard_on_cpu()
    for name, words in json.loads(listed.read_text()):
        try:
            do(words)
        except BaseException:
            (listed.parent / "failed").write_text(name)
            raise
        # Trainers collect garbage after every task; what was imported by now is none.
        gc.freeze()
    leave()


def do(words: Sequence[str]) -> None:
    """Do the job that ``words`` of ``trainer train`` ask for, as that command does, without a report.

    Raises:
        UserError: whatever is wrong with it.
    """
    verb, *options = words
    if verb != "train":
        raise ValueError(f"'trainer {verb}' trains nothing; a job is the words of `trainer train`")
    asked = command.make_context("trainer train", list(options)).params
    settings = {key: asked[key] for key in ("model", "data", "algorithm")}
    recipe = expand(Document(settings, {}, "train"), sets=asked["sets"], plugins=asked["plugins"])
    output, quiet = Path(asked["output"]), Console(enabled=False)
    run_job(recipe.jobs[0], output, console=quiet, resume=asked["resume"])


if __name__ == "__main__":
    work(Path(sys.argv[1]))
