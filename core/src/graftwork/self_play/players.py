"""The team: checkpoints of one model that write answers and are compared with, and how one of them is put in place.

Adapters share one base model in memory. Of full weights one player is loaded at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwork.errors import UserError
from graftwork.files import sha256, write_json_atomic
from graftwork.models import load_chosen, load_config, resolve
from graftwork.train.checkpoints import read_json

if TYPE_CHECKING:
    from graftwork.recipe import ModelOptions
    from graftwork.train.adapters import AdapterStack

PLAYERS = "players.json"


@dataclass(frozen=True)
class Player:
    """A checkpoint: ``index`` counts iterations, 0 is the start, those given by the user are negative.

    ``folder`` is None where it is the model that the job names. ``checkpoint`` is the SHA-256 of its weights.
    """

    index: int
    name: str
    folder: Path | None
    checkpoint: str


class Team:
    """All players so far, the oldest first.

    ``folder`` keeps a record of whose weights took part; on resuming they must be the same.
    """

    def __init__(self, folder: Path, given: Sequence[str]) -> None:
        self.folder = folder
        self.players: list[Player] = []
        self._known = dict(read_json(folder / PLAYERS) or {})
        for number, ref in enumerate(given):
            self.add(number - len(given), f"team-{number + 1}", resolve(ref).folder)

    def add(self, index: int, name: str, folder: Path | None, weights: Any = None) -> None:
        """Take in a checkpoint: a folder of safetensors, or the model ``weights`` in memory.

        Raises:
            UserError: another checkpoint took part under this name before the run was resumed.
        """
        before = self._known.get(name)
        checkpoint = before
        if folder is not None:
            checkpoint = _of_files(folder)
        elif weights is not None:
            checkpoint = _of_model(weights)
        assert checkpoint is not None
        if before is not None and before != checkpoint:
            raise UserError(
                f"player '{name}' has changed since it took part in this run ({folder or 'the model'}); put its "
                f"weights back, or begin again in another --output"
            )
        self._known[name] = checkpoint
        self.players.append(Player(index, name, folder, checkpoint))

    def write(self) -> None:
        write_json_atomic(self.folder / PLAYERS, self._known)

    def last(self, count: int) -> list[Player]:
        """Return the last ``count`` players (fewer where there are fewer), the newest first."""
        return self.players[-count:][::-1] if count else []


class Bench:
    """Puts players in place of the model that is trained, and puts that back.

    ``stack`` holds the newest player, whose turn costs nothing.
    """

    def __init__(self, stack: AdapterStack, options: ModelOptions) -> None:
        self.stack = stack
        self.options = options

    @contextlib.contextmanager
    def seated(self, players: Sequence[Player], newest: Player) -> Iterator[Callable[[Player], Any]]:
        """Yield a function from a player (one of ``players`` or ``newest``) to the model in its state."""
        others = [player for player in players if player.checkpoint != newest.checkpoint]
        if self.stack.adapter is None:
            yield lambda player: self.stack.model if player not in others else self._whole(player)
            return
        folders = {f"player{player.index}": player.folder for player in others}
        with self.stack.visited_by(folders) as use:

            def seat(player: Player) -> Any:
                use(f"player{player.index}" if player in others else None)
                return self.stack.model

            yield seat

    def _whole(self, player: Player) -> Any:
        options = self.options
        if player.folder:
            options = options.model_copy(update={"ref": str(player.folder), "dtype": "auto"})
        model = load_chosen(options)
        return model.to(self.stack.model.device).eval()


def check_given(team: Sequence[str], options: ModelOptions, adapter: bool) -> None:
    """Refuse players that are no earlier states of what is trained.

    Raises:
        UserError: an adapter where whole models play or the reverse, or one of another base model.
    """
    for number, ref in enumerate(team, 1):
        source = resolve(ref)
        where = f"team member {number}, '{ref}'"
        if source.folder is None:
            raise UserError(f"{where} is a hub id; a team is made of folders, download it first")
        if source.adapter != adapter:
            is_one, wanted = (
                ("an adapter", "a whole model") if source.adapter else ("a whole model", "an adapter")
            )
            raise UserError(f"{where} is {is_one}, but what is trained here is {wanted}")
        if source.adapter:
            config = read_json(Path(source.path) / "adapter_config.json") or {}
            base = config.get("base_model_name_or_path")
            if not _same_model(str(base), options.ref):
                raise UserError(
                    f"{where} is an adapter of the base model '{base}', but the one that plays here is "
                    f"'{options.ref}'; a team shares one base model"
                )
        else:
            mine = load_config(options.ref, trust_remote_code=options.trust_remote_code).get_text_config()
            theirs = load_config(ref, trust_remote_code=options.trust_remote_code).get_text_config()
            for field in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
                ours, other = getattr(mine, field, None), getattr(theirs, field, None)
                if ours != other:
                    raise UserError(
                        f"{where} has {field} {other}, but the model that plays here has {ours}; a team shares one "
                        f"base model"
                    )


def _same_model(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        return resolve(one).path == resolve(other).path
    except UserError:
        return False


def _of_files(folder: Path) -> str:
    """Return one SHA-256 over the weights files of ``folder``."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        total.update(f"{path.name} {sha256(path)}\n".encode())
    return total.hexdigest()


def _of_model(model: torch.nn.Module) -> str:
    """Return one SHA-256 over the parameters in memory."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
