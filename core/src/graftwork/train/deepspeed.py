"""What the trainer's ``deepspeed`` field asks for, read before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftwork.errors import UserError


def read_config(train: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the DeepSpeed configuration that ``train.deepspeed`` names or holds, None where there is none.

    Raises:
        UserError: the file is missing or no JSON object.
    """
    value = train.get("deepspeed")
    return None if value is None else parsed(value, "train.deepspeed")


def parsed(value: str | Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the DeepSpeed configuration that the setting ``key`` names (a file) or holds.

    Raises:
        UserError: the file is missing or no JSON object.
    """
    if isinstance(value, Mapping):
        return dict(value)
    try:
        config = json.loads(Path(value).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{key} names '{value}', which cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{key}: '{value}' is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{key}: '{value}' holds no JSON object")
    return config


def zero_stage(train: Mapping[str, Any]) -> int:
    """Return the ZeRO stage (0 where nothing is sharded)."""
    section = (read_config(train) or {}).get("zero_optimization") or {}
    return int(section.get("stage", 0))
