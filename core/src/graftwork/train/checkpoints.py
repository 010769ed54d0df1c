"""Checkpoints inside a task and stages between tasks: complete or absent, and resumable.

The Trainer writes ``stages/current/checkpoint-<step>``. Our marker file goes in last; a checkpoint
without it was cut off by a kill and is removed on resume. A finished task becomes ``stages/<index>-<name>``,
built aside and renamed.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from graftwork.compat.trainer import TOKENS
from graftwork.errors import UserError
from graftwork.files import write_json_atomic

if TYPE_CHECKING:
    from transformers import Trainer

    from graftwork.run import Run

MARKER = "graftwork.json"
CURRENT = "current"
STAGE = "stage.json"


def save_plugin_states(run: Run, folder: Path) -> int:
    """Write every plugin's state below ``folder``; return its size in bytes."""
    size = 0
    for plugin, state in run.plugins.call("save_state", run=run):
        if run.main and state:
            (folder / "plugins").mkdir(parents=True, exist_ok=True)
            path = folder / "plugins" / f"{plugin}.safetensors"
            save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, path)
            size += path.stat().st_size
    return size


def load_plugin_states(run: Run, folder: Path) -> None:
    """Hand every plugin the state that it saved in ``folder``."""
    for plugin in run.plugins.implements("load_state"):
        path = folder / "plugins" / f"{plugin}.safetensors"
        state: dict[str, torch.Tensor] = load_file(path) if path.exists() else {}
        run.plugins.call_on(plugin, "load_state", run=run, state=state)


class MarkCheckpoints(TrainerCallback):
    """After the Trainer has saved a checkpoint: add plugin state, then the marker that makes it count.

    The marker holds the place in ``metrics.jsonl`` and what ``so_far`` tells: the task, and the stream's scores. Older
    checkpoints go after it was written, which the Trainer would do before: there would be none for a moment.
    """

    def __init__(self, run: Run, trainer: Trainer, so_far: Callable[[], Mapping[str, Any]]) -> None:
        self.run = run
        self.trainer = trainer
        self.so_far = so_far
        self.limit = trainer.args.save_total_limit
        trainer.args.save_total_limit = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # What is averaged until it is logged must not be open when a checkpoint is written: a resumed run lacks it.
        control.should_log = control.should_log or control.should_save

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_plugin_states(self.run, folder)
        # Every process writes its own random state; the marker must not come before the last of them.
        self.trainer.accelerator.wait_for_everyone()
        if self.run.main:
            # The Trainer pickles its arguments beside the weights; nothing ever reads that file.
            (folder / "training_args.bin").unlink(missing_ok=True)
            position = {"step": state.global_step, "events": self.run.events.position}
            position["tokens"] = getattr(self.trainer, TOKENS, 0)
            write_json_atomic(folder / MARKER, {**position, **self.so_far()})
            best = state.best_model_checkpoint
            rotate_checkpoints(args.output_dir, save_total_limit=self.limit, best_model_checkpoint=best)


def latest_checkpoint(run: Run, task: str) -> tuple[Path, Mapping[str, Any]] | None:
    """Return the newest complete checkpoint of ``task``; remove incomplete ones and those of other tasks."""
    best: tuple[Path, Mapping[str, Any]] | None = None
    for folder in (run.stages / CURRENT).glob("checkpoint-*"):
        marker = read_json(folder / MARKER)
        if marker is None or marker.get("task") != task:
            if run.main:
                shutil.rmtree(folder)
        elif best is None or marker["step"] > best[1]["step"]:
            best = (folder, marker)
    return best


@contextlib.contextmanager
def refused_pickles(folder: Path | None) -> Iterator[None]:
    """Say in a sentence which file of a checkpoint is refused because it holds more than tensors and numbers.

    The Trainer's own torch files are read by an unpickler that knows nothing else.

    Raises:
        UserError: there is one.
    """
    try:
        yield
    except pickle.UnpicklingError:
        for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]) if folder else []:
            # Random states are arrays of numpy's, which the Trainer allows.
            foreign = [
                name
                for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)
                if not name.startswith("numpy.")
            ]
            if foreign:
                raise UserError(
                    f"'{path}' holds what no checkpoint does ({foreign[0]}) and may run code when it is read; nothing "
                    f"of it was executed: remove '{folder}' to go on from an earlier checkpoint"
                ) from None
        raise


def stage_folder(run: Run, index: int, name: str) -> Path:
    """Return the folder of the finished task ``index`` (from 0)."""
    return run.stages / f"{index + 1:02d}-{name}"


def finished_stages(run: Run, names: list[str]) -> list[Path]:
    """Return the folders of the tasks finished so far, in order.

    Raises:
        UserError: the folder holds stages of other tasks, or of the same in another order.
    """
    if not run.stages.exists():
        return []
    # One that was about to be put in its place has a dot in front: a kill came before, and it is not finished.
    there = {p.name: p for p in run.stages.glob("[!.]*") if (p / STAGE).exists()}
    stages = []
    for index, name in enumerate(names):
        folder = stage_folder(run, index, name)
        if folder.name not in there:
            break
        stages.append(there.pop(folder.name))
    if there:
        raise UserError(
            f"'{run.stages}' holds finished tasks that this stream does not have at that place: "
            f"{', '.join(sorted(there))}; resume with the tasks in the order they were trained in"
        )
    return stages


def read_json(path: Path) -> Mapping[str, Any] | None:
    """Return the JSON object in ``path``, or None where it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
