"""Encoder and connector of a LLaVA-style checkpoint, without its language model.

The layout: ``config.json`` with ``vision_config`` and ``text_config``; tensors ``vision_tower.*`` and
``multi_modal_projector.*`` beside ``language_model.*``, which the merge reads. Names with ``model.`` in front, or with
``vision_tower.vision_model.``, are older and newer spellings of the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from graftwork import UserError
from graftwork.models import resolve
from graftwork.transform.source import checkpoint_files, downloaded
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

TOWER, PROJECTOR = "vision_tower.", "multi_modal_projector."


class VisionConnector(nn.Module):
    """Images to soft tokens: the tower, the chosen layers' patches, the projector; frozen."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the soft tokens (images x tokens x h) of images (images x channels x height x width)."""
        layers = self.config.vision_feature_layer
        found = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        chosen = [found[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        if self.config.vision_feature_select_strategy == "default":
            # Without the class token.
            chosen = [states[:, 1:] for states in chosen]
        return self.multi_modal_projector(torch.cat(chosen, -1))


def load_connector(ref: str, *, dtype: torch.dtype | None = None) -> VisionConnector:
    """Load encoder and connector of a LLaVA-style checkpoint, byte for byte as the expert has them.

    Args:
        ref: folder, run or hub id.
        dtype: to compute in; by default as stored.

    Raises:
        UserError: it is no such checkpoint, or tensors of tower or projector are missing or of another shape.
    """
    where = resolve(ref)
    folder = where.folder if where.folder is not None else downloaded(ref)
    config = _config(ref, folder)
    connector = VisionConnector(config)
    expected = connector.state_dict()
    stored: dict[str, torch.Tensor] = {}
    for path in sorted({path for path, _ in checkpoint_files(folder).values()}):
        with safe_open(path, framework="pt", device="cpu") as reader:
            for key in reader.keys():  # noqa: SIM118
                name = key.removeprefix("model.")
                if name.startswith((TOWER, PROJECTOR)):
                    stored[_own_name(name, expected)] = reader.get_tensor(key)
    # Buffers such as position ids are made, not stored, by newer versions.
    buffers = {name for name, _ in connector.named_buffers()}
    missing = sorted(expected.keys() - stored.keys() - buffers)
    if missing:
        raise UserError(
            f"'{ref}' lacks '{missing[0]}' and {len(missing) - 1} more tensors of encoder and connector"
        )
    for name, tensor in stored.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise UserError(
                f"'{ref}': tensor '{name}' has shape {tuple(tensor.shape)}, and its config asks for "
                f"{tuple(expected[name].shape)}"
            )
    kept = {name: tensor for name, tensor in stored.items() if name in expected}
    connector.to(dtype or next(iter(kept.values())).dtype)
    connector.load_state_dict(kept, strict=False)
    return connector


def _config(ref: str, folder: Path) -> LlavaConfig:
    try:
        raw: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"'{ref}' has no readable config.json") from None
    if raw.get("model_type") != "llava" or "vision_config" not in raw:
        raise UserError(
            f"'{ref}' is a model of type '{raw.get('model_type')}', not a LLaVA-style one with vision_config and "
            f"text_config"
        )
    return LlavaConfig.from_dict(raw)


def _own_name(name: str, expected: Mapping[str, torch.Tensor]) -> str:
    inner = f"{TOWER}vision_model."
    for spelling in (name, name.replace(inner, TOWER, 1), name.replace(TOWER, inner, 1)):
        if spelling in expected:
            return spelling
    return name
