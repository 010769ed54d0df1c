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
    if value is None:
        return None
    if isinstance(value, Mapping):
        return dict(value)
    try:
        config = json.loads(Path(value).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"train.deepspeed names '{value}', which cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"train.deepspeed: '{value}' is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"train.deepspeed: '{value}' holds no JSON object")
    return config


def zero_stage(train: Mapping[str, Any]) -> int:
    """Return the ZeRO stage (0 where nothing is sharded)."""
    section = (read_config(train) or {}).get("zero_optimization") or {}
    return int(section.get("stage", 0))


def check(train: Mapping[str, Any]) -> None:
    """Refuse what a stream of tasks cannot run under.

    Between tasks the model is scored, measured and saved without an engine, which needs whole weights.

    Raises:
        UserError: the parameters would be sharded (ZeRO-3).
    """
    if zero_stage(train) >= 3:
        raise UserError(
            "train.deepspeed asks for ZeRO stage 3, which shards the weights; a stream of tasks scores and saves "
            "whole weights between tasks: use stage 1 or 2 (with offload_optimizer where memory is short)"
        )
