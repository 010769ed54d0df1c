"""Refuse what would do nothing."""

from __future__ import annotations

from collections.abc import Sequence


def check_team(team: Sequence[str], players: int, rounds: int) -> None:
    """Refuse older checkpoints that take part in no iteration; the model itself is one player.

    Raises:
        ValueError: how many do.
    """
    room = max(players, rounds) - 1
    if len(team) > room:
        raise ValueError(
            f"team names {len(team)} older checkpoints, and beside the newest {room} take part (players = {players}, "
            f"rounds = {rounds}); leave the oldest out"
        )
