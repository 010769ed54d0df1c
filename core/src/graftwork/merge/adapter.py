"""An expert that is a LoRA adapter: its difference to the base is a product of two small matrices, made row by row."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from graftwork.errors import UserError, did_you_mean
from graftwork.merge.rows import DTYPES, Stored, read_rows, stored_tensors

_BLOCK = 64
"""Products are made of so many rows at a time, whichever rows are asked for, so that they come out alike."""
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


class Adapter:
    """The difference ``scale * B A`` of each weight that an adapter changes.

    Attributes:
        bits: that the adapter takes in its file.
        changed: names of the parameters that it changes.

    Raises:
        UserError: another kind of adapter than LoRA, tensors that are no LoRA factors or that fit no parameter of
            the base, factors of other shapes than the parameter's.
    """

    def __init__(self, expert: str, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.expert = expert
        self.config = _config(expert, folder)
        found = stored_tensors([folder / "adapter_model.safetensors"])
        odd = next((key for key, tensor in found.items() if tensor.dtype not in DTYPES), None)
        if odd is not None:
            raise UserError(
                f"expert '{expert}': the adapter's tensor '{odd}' is {found[odd].dtype}; float32, bfloat16 or float16 "
                f"is wanted"
            )
        self.bits = sum(math.prod(one.shape) * DTYPES[one.dtype].itemsize * 8 for one in found.values())
        factors: dict[str, dict[str, Stored]] = {}
        for key, tensor in found.items():
            parts = _KEY.fullmatch(key)
            name = f"{parts[1]}.weight" if parts else ""
            if parts is None or name not in shapes:
                raise UserError(
                    f"expert '{expert}': the adapter's tensor '{key}' changes no weight of the base by a product of "
                    f"two matrices{did_you_mean(name, shapes)}; merge the adapter into its base and name the result"
                )
            factors.setdefault(name, {})[parts[2]] = tensor
        self._factors = {
            name: self._checked(name, pair, shapes[name]) for name, pair in sorted(factors.items())
        }
        self.changed = tuple(self._factors)

    def delta(self, name: str, rows: slice, columns: int) -> torch.Tensor:
        """Return rows of the difference (rows x columns, float32); zeros where the adapter changes nothing."""
        if name not in self._factors:
            return torch.zeros(rows.stop - rows.start, columns)
        left, right = self._factors[name]
        first = rows.start // _BLOCK * _BLOCK
        last = min(left.shape[0], -(-rows.stop // _BLOCK) * _BLOCK)
        parts = [(left[at : at + _BLOCK] @ right).float() for at in range(first, last, _BLOCK)]
        return torch.cat(parts)[rows.start - first : rows.stop - first]

    def _checked(
        self, name: str, pair: Mapping[str, Stored], shape: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors in float64, the scale in the left one."""
        if set(pair) != {"A", "B"}:
            raise UserError(f"expert '{self.expert}': the adapter has only one of two factors for '{name}'")
        a, b = (read_rows(pair[side], slice(0, pair[side].shape[0])).double() for side in "AB")
        left, right = (a.T, b.T) if self.config.get("fan_in_fan_out") else (b, a)
        if (left.shape[0], right.shape[1]) != shape or left.shape[1] != right.shape[0]:
            raise UserError(
                f"expert '{self.expert}': the adapter's factors for '{name}' have shapes {tuple(b.shape)} and "
                f"{tuple(a.shape)}, which do not make {shape}"
            )
        return left * self._scale(name, a.shape[0]), right.contiguous()

    def _scale(self, name: str, rank: int) -> float:
        module = name.removesuffix(".weight")
        alpha = self.config["lora_alpha"]
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _config(expert: str, folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        _ = config["base_model_name_or_path"] + config["peft_type"]
        if config["peft_type"] == "LORA":
            _ = float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"expert '{expert}': '{path}' is not the config of an adapter: it needs base_model_name_or_path, peft_type "
            f"and lora_alpha"
        ) from None
    kind = config.get("peft_type")
    odd = [
        key
        for key in ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices")
        if config.get(key)
    ]
    if config.get("bias", "none") != "none":
        odd.append("bias")
    if kind != "LORA" or odd:
        what = f"has {odd[0]}" if kind == "LORA" else f"is a {kind} adapter"
        raise UserError(
            f"expert '{expert}' {what}, so its difference to the base is no product of two matrices; merge it into its "
            f"base (PEFT: merge_and_unload) and name the result"
        )
    return config
